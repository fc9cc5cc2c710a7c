"""Losses and routes of text under a policy.

Shape letters: W windows, B batch, T tokens, L layers.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from duollm.models.modeling_duo import DuoForCausalLM
from duollm.models.policy import Policy


@torch.inference_mode()
def policy_losses(
    model: DuoForCausalLM,
    token_ids_WT: Tensor,
    policy: Policy | None = None,
    routes: Tensor | None = None,
    batch_size: int = 16,
) -> tuple[Tensor, Tensor]:
    """Run the model as it would run in use: one forward per batch, each token on the branch chosen for it.

    Args:
        token_ids_WT: token ids [W, T], no padding.
        policy, routes: as in `DuoForCausalLM.forward`; routes [L] or [W, T, L].

    Returns:
        nll [W, T - 1] in nats, and the routes [W, T - 1, L] of the tokens that made the predictions.
    """
    losses, taken = [], []
    for start in range(0, len(token_ids_WT), batch_size):
        batch_BT = token_ids_WT[start : start + batch_size]
        given = routes if routes is None or routes.ndim == 1 else routes[start : start + batch_size]
        output = model(input_ids=batch_BT, policy=policy, routes=given, use_cache=False)
        logits_BTV = output.logits[:, :-1].float()
        losses.append(cross_entropy(logits_BTV.flatten(0, 1), batch_BT[:, 1:].flatten(), reduction="none"))
        taken.append(output.routes[:, :-1])
    return torch.cat(losses).view(len(token_ids_WT), -1), torch.cat(taken)
