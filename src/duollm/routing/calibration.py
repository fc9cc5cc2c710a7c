"""Finding the price at which a router's hard choices spend the budget.

The higher the price of big, the less is spent. But choices change the hidden states that later choices see, so what is
spent at a price is found by running the model, and the price by a search over such runs.

Shape letters: B batch, T tokens, L layers.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from duollm.models.branch import Branch
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.routing.router import Router, branch_costs

_FIRST_STEP, _GROWTH = 1e-3, 4.0


@torch.inference_mode()
def calibrate(
    model: DuoForCausalLM,
    router: Router,
    batches: Sequence[Tensor],
    budget: float,
    tolerance: float = 0.002,
    rounds: int = 40,
) -> float:
    """Set `router.price` so that its hard choices on `batches` spend `budget`.

    The price is found roughly on a quarter of the batches first, from the router's present one, and then on all.

    Args:
        batches: token ids [B, T] each, from validation documents.
        budget: wanted mean cost per layer in the units of `branch_costs`: the share of big where nothing is skipped.
        rounds: most runs over the batches.

    Returns:
        What is spent on `batches` at the price that came nearest.
    """
    router.eval()
    few = batches[: max(1, len(batches) // 4)]
    if len(few) < len(batches):
        _nearest_price(model, router, few, budget, 4 * tolerance, rounds)
    return _nearest_price(model, router, batches, budget, tolerance, rounds)


def _nearest_price(
    model: DuoForCausalLM, router: Router, batches: Sequence[Tensor], budget: float, tolerance: float, rounds: int
) -> float:
    """Search from the router's price on, set the one that came nearest, and return what it spends."""
    tried: list[tuple[float, float]] = []

    def excess(price: float) -> float:
        router.price.fill_(price)
        tried.append((mean_cost(model, router, batches) - budget, price))
        return tried[-1][0]

    start = router.price.item()
    _find_root(excess, start, _FIRST_STEP + abs(start) / 16, tolerance, rounds)
    nearest, price = min(tried, key=lambda each: abs(each[0]))
    router.price.fill_(price)
    return budget + nearest


def mean_cost(model: DuoForCausalLM, router: Router, batches: Sequence[Tensor]) -> float:
    """What the router's hard choices cost per token and layer, in the units of `branch_costs`."""
    cost_by_branch, total, count = branch_costs(model.config), 0.0, 0
    for batch_BT in batches:
        for choice_BT in model.model(input_ids=batch_BT, policy=router, use_cache=False).choices:
            taken = torch.bincount(choice_BT.flatten(), minlength=len(Branch)).cpu()
            total += float(taken.double() @ cost_by_branch.double())
            count += choice_BT.numel()
    return total / count


def _find_root(excess: Callable[[float], float], start: float, step: float, tolerance: float, rounds: int) -> None:
    """Evaluate a falling function until it is within `tolerance` of 0, or `rounds` times.

    First ever longer steps away from `start` until the sign changes, then alternately the secant and the middle of the
    bracket: jumps of the function, where many tokens share a score, stall the secant alone.
    """
    price, here = start, excess(start)
    step = step if here > 0 else -step
    left, right = (price, here), (price, here)
    for round_ in range(rounds - 1):
        if abs(here) <= tolerance:
            return
        if left[1] * right[1] > 0 or left == right:
            left, price, step = right, right[0] + step, step * _GROWTH
            here = excess(price)
            right = (price, here)
            continue
        slope = (right[1] - left[1]) / (right[0] - left[0])
        price = left[0] - left[1] / slope if round_ % 2 else (left[0] + right[0]) / 2
        here = excess(price)
        left, right = ((price, here), right) if here * right[1] < 0 else (left, (price, here))
