"""Setting a router's threshold so that its hard choices spend the budget.

Shape letters: B batch, T tokens.
"""

import torch
from torch import Tensor

from duollm.models.branch import Branch
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.routing.linear import LinearRouter


class _Watched:
    """The router, with the margins of its choices kept."""

    def __init__(self, router: LinearRouter) -> None:
        self.router = router
        self.margins: list[Tensor] = []

    def __call__(self, layer_idx: int, states_BTD: Tensor, memory: object) -> tuple[Tensor, object]:
        self.margins.append(self.router.margin(layer_idx, states_BTD).flatten())
        return self.router(layer_idx, states_BTD, memory)


@torch.inference_mode()
def calibrate(
    model: DuoForCausalLM,
    router: LinearRouter,
    batches: list[Tensor],
    budget: float,
    tolerance: float = 0.002,
    rounds: int = 10,
) -> float:
    """Set `router.threshold` so that the share of hard big choices on `batches` is `budget`.

    The threshold that would give the share for the hidden states at hand changes those states, so
    the two are iterated; the threshold that came nearest is kept.

    Args:
        batches: token ids [B, T] each, from validation documents.
        budget: wanted share of big, 0 .. 1.

    Returns:
        The share reached on `batches`.
    """
    router.eval()
    reached = []
    for _ in range(rounds):
        share, margins = _run(model, router, batches)
        reached.append((abs(share - budget), share, router.threshold.clone()))
        if abs(share - budget) <= tolerance:
            break
        router.threshold.copy_(_quantile(margins, 1 - budget))
    _, share, threshold = min(reached, key=lambda each: each[0])
    router.threshold.copy_(threshold)
    return share


def _run(model: DuoForCausalLM, router: LinearRouter, batches: list[Tensor]) -> tuple[float, Tensor]:
    """The hard big share over all layers and tokens, and the margins of all choices."""
    watched, big, total = _Watched(router), 0, 0
    for batch_BT in batches:
        choices = model.model(input_ids=batch_BT, policy=watched).choices
        big += sum(int((choice == Branch.BIG).sum()) for choice in choices)
        total += sum(choice.numel() for choice in choices)
    return big / total, torch.cat(watched.margins)


def _quantile(values: Tensor, share: float) -> Tensor:
    """The smallest value that at least `share` of the values do not exceed (torch.quantile stops at 16 M)."""
    return values.kthvalue(min(len(values), max(1, round(share * len(values))))).values
