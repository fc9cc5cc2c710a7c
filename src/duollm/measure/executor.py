"""The executor: runs text under a policy, or under given routes, as the model runs in use.

Shape letters: W windows, B windows per forward, T tokens, L layers, V vocabulary.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from duollm.models.branch import Branch
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.models.policy import Policy
from duollm.routes.space import RouteSpace

_LOGITS = 2**25
"""The largest number of logits at a time: 128 MiB, where a large vocabulary would take gigabytes."""


@torch.inference_mode()
def policy_losses(
    model: DuoForCausalLM,
    token_ids_WT: Tensor,
    policy: Policy | None = None,
    routes: Tensor | None = None,
    batch_size: int = 16,
    attention_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the model as in use: one forward per batch, in which each token takes the branch chosen for it.

    Args:
        token_ids_WT: token ids [W, T]. The losses of padding have no meaning.
        policy, routes, attention_mask: as in `DuoForCausalLM.forward`; routes [L] or [W, T, L].

    Returns:
        nll [W, T - 1] in nats, and the routes [W, T - 1, L] of the positions that made the predictions.
    """
    losses, taken = [], []
    of_a_window = token_ids_WT.shape[1] * model.config.vocab_size
    batch_size = max(1, min(batch_size, _LOGITS // of_a_window))
    for start in range(0, len(token_ids_WT), batch_size):
        windows = slice(start, start + batch_size)
        batch_BT, mask_BT = token_ids_WT[windows], None if attention_mask is None else attention_mask[windows]
        given = routes if routes is None or routes.ndim == 1 else routes[windows]
        output = model(input_ids=batch_BT, attention_mask=mask_BT, policy=policy, routes=given, use_cache=False)
        # Window by window: slices of a window are contiguous, and what the loss makes of them stays small.
        losses += [
            cross_entropy(logits_TV[:-1].float(), ids_T[1:], reduction="none")
            for logits_TV, ids_T in zip(output.logits, batch_BT, strict=True)
        ]
        taken.append(output.routes[:, :-1])
    return torch.cat(losses).view(len(token_ids_WT), -1), torch.cat(taken)


def token_columns(nll_WT: Tensor, routes_WTL: Tensor, space: RouteSpace, ending: str = "") -> dict[str, NDArray[Any]]:
    """Return the columns of a policy's losses and routes, one row per predicted token (docs/formats.md).

    Args:
        ending: ending of the column names, which tells the policies of one file apart.
    """
    return {
        f"nll{ending}": nll_WT.flatten().cpu().numpy(),
        f"route{ending}": space.encode(routes_WTL).flatten().cpu().numpy(),
    }


def route_digits(routes: Tensor) -> NDArray[np.str_]:
    """Return routes [N, L] as N strings of L digits, which the policy `routes:DIGITS` takes."""
    digits_NL = np.ascontiguousarray(routes.cpu().numpy().astype(np.uint8) + ord("0"))
    return digits_NL.view(f"S{digits_NL.shape[1]}").reshape(-1).astype(np.str_)


def branch_shares(routes: Tensor) -> tuple[float, float, float]:
    """Return the shares of skip, small and big in routes of any shape."""
    skip, small, big = (torch.bincount(routes.flatten(), minlength=len(Branch)) / routes.numel()).tolist()
    return skip, small, big


def deciding_flops(policy: Policy) -> int:
    """Return the FLOPs per token that a policy needs to decide: those of a router, 0 for other policies."""
    own = getattr(policy, "flops_per_token", None)
    return 0 if own is None else int(own())
