"""Makes routers meet their budget: k big layers per token on average, or exactly k on every token.

The higher the price of big, the less a router spends. Choices change the hidden states that later choices see, so only
a run of the model tells what is spent at a price. Calibration searches for the price over such runs.

Shape letters: B batch, T tokens, N tokens with a choice, L layers, J groups of layers, K numbers of big layers left.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from duollm.models.branch import Branch
from duollm.models.configuration_duo import DuoConfig
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.routers.base import Router, branch_costs
from duollm.routes.space import check_big_layers

_FIRST_STEP, _GROWTH = 1e-3, 4.0
_MOST_RUNS = 40


class ExactBudget(nn.Module):
    """A hard router held to exactly `big_layers` big layers per token.

    The router decides, at the price of each layer, as long as there is a choice. A token that would take big but could
    then not spend exactly k (because it has spent its k, or its later groups of layers do not add up to what is left)
    takes the most expensive of the router's other branches. A token that needs big to spend its k takes big.
    """

    def __init__(self, router: Router, big_layers: int) -> None:
        super().__init__()
        check_big_layers(router.space, big_layers)
        self.router, self.big_layers, space = router, big_layers, router.space
        self.otherwise = int(max(branch for branch in router.branches if branch != Branch.BIG))
        self.free = big_layers - space.spent_by_fixed[1]
        self.size_of = dict(zip(space.leaders, space.group_sizes, strict=True))
        # Whether the groups after each one can spend exactly 0, 1, ... big layers.
        ends_JK = [[(left in {big for _, big in sums}) for left in range(self.free + 1)] for sums in space.sums[1:]]
        self.ends_of = dict(zip(space.leaders, map(torch.tensor, ends_JK), strict=True))

    def begin(self, position_ids_BT: Tensor) -> Any:
        """Return the memory for layer 0: the router's memory, and the number of big layers that each token has left."""
        inner = self.router.begin(position_ids_BT, self.big_layers)
        return inner, torch.full_like(position_ids_BT, self.free)

    def forward(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """Choose for one layer, integers [B, T]. The memory has the form that `begin` returns."""
        inner, left_BT = memory
        price = self.price(layer_idx, states_BTD, memory)
        choice_BT, inner = self.router.decide(layer_idx, states_BTD, inner, price)
        may_BT, may_not_BT = self.options(layer_idx, left_BT)
        choice_BT = choice_BT.masked_fill(~may_BT & (choice_BT == Branch.BIG), self.otherwise)
        choice_BT = choice_BT.masked_fill(~may_not_BT, int(Branch.BIG))
        inner = self.router.remember(layer_idx, choice_BT, inner)
        return choice_BT, (inner, left_BT - (choice_BT == Branch.BIG).long() * self.size_of[layer_idx])

    def options(self, layer_idx: int, left_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Return whether a token that must spend `left_BT` from this layer on may take big here, and another branch."""
        self.ends_of[layer_idx] = ends_K = self.ends_of[layer_idx].to(left_BT.device)
        after_BT = left_BT - self.size_of[layer_idx]
        return ends_K[after_BT.clamp(min=0)] & (after_BT >= 0), ends_K[left_BT]

    def price(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> Tensor:
        """Return the price of big at a layer, a scalar."""
        return self.router.exact_price_L[layer_idx]

    def flops_per_token(self) -> int:
        """Count the FLOPs of the router. The rest is a few integers per token."""
        return self.router.flops_per_token()


@torch.inference_mode()
def calibrate(
    model: DuoForCausalLM,
    router: Router,
    batches: Sequence[Tensor],
    budget: float,
    tolerance: float = 0.002,
) -> float:
    """Set `router.price` so that its hard choices on `batches` spend `budget`.

    The search starts at the router's present price. It first uses a quarter of the batches, then all of them, from the
    price and the slope that it found.

    Args:
        batches: token ids [B, T] each, from validation documents.
        budget: wanted mean cost per layer in the units of `branch_costs`: the share of big if nothing is skipped.

    Returns:
        The mean cost on `batches` at the price that came nearest.
    """
    router.eval()
    few, slope = batches[: max(1, len(batches) // 4)], 0.0
    if len(few) < len(batches):
        _, slope = _nearest_price(model, router, few, budget, 4 * tolerance)
    return _nearest_price(model, router, batches, budget, tolerance, slope)[0]


@torch.inference_mode()
def calibrate_exact(model: DuoForCausalLM, router: Router, batches: Sequence[Tensor], big_layers: int) -> None:
    """Set `router.exact_price_L` so that each layer is big as often with `ExactBudget` as without it.

    At the price of spending k on average, tokens that would like more than k have nothing left for the last layers.
    What a layer spends depends only on the layers before it. So one forward per batch finds the prices of all layers,
    one after another; the result is their mean over the batches.

    Args:
        batches: few and large batches of token ids [B, T], from validation documents.
        big_layers: the budget k. `router.price` must be calibrated for it already.
    """
    router.eval()
    space = router.space
    big_J = torch.zeros(len(space.leaders))
    for batch_BT in batches:
        choices = model.model(input_ids=batch_BT, policy=router.policy(), use_cache=False).choices
        big_J += torch.stack([(choices[leader] == Branch.BIG).sum() for leader in space.leaders]).cpu()
    of_layers = (big_J * torch.tensor(space.group_sizes)).sum().clamp(min=1)
    share_J = big_J * ((big_layers - space.spent_by_fixed[1]) / of_layers)
    found = []
    for batch_BT in batches:
        pricing = _Pricing(router, big_layers, share_J.tolist())
        model.model(input_ids=batch_BT, policy=router.policy(pricing), use_cache=False)
        found.append(torch.stack(pricing.prices))
    router.exact_price_L[space.leaders] = torch.stack(found).mean(0)


class _Pricing(ExactBudget):
    """Sets the price of each group, as the forward reaches it, to one at which a given share of tokens takes big."""

    def __init__(self, router: Router, big_layers: int, share_J: Sequence[float]) -> None:
        super().__init__(router, big_layers)
        self.share_J, self.prices = share_J, list[Tensor]()

    def price(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> Tensor:
        """Find the price among what the tokens would pay that have a choice."""
        inner, left_BT = memory
        may_BT, may_not_BT = self.options(layer_idx, left_BT)
        forced = (~may_not_BT).sum().item()
        highest_BT, _, _ = self.router.margin(layer_idx, states_BTD, inner)
        highest_N = highest_BT[may_BT & may_not_BT].sort(descending=True).values
        wanted = round(self.share_J[len(self.prices)] * left_BT.numel() - forced)
        if highest_N.numel():
            self.prices.append(highest_N[min(max(wanted, 0), len(highest_N) - 1)])
        else:
            self.prices.append(self.router.price)
        return self.prices[-1]


def budget_of(config: DuoConfig, router: Router, big_layers: int) -> float:
    """Return the mean cost per layer of a token with `big_layers` big layers, in the units of `branch_costs`."""
    fixed = [branch for branch in router.space.fixed.values() if branch != Branch.BIG]
    cost_3 = branch_costs(config, router.branches)
    return (big_layers + sum(cost_3[branch].item() for branch in fixed)) / router.num_layers


def mean_cost(model: DuoForCausalLM, router: Router, batches: Sequence[Tensor]) -> float:
    """Return the mean cost per token and layer of the router's hard choices, in the units of `branch_costs`."""
    cost_by_branch, total, count = branch_costs(model.config, router.branches), 0.0, 0
    for batch_BT in batches:
        for choice_BT in model.model(input_ids=batch_BT, policy=router.policy(), use_cache=False).choices:
            taken = torch.bincount(choice_BT.flatten(), minlength=len(Branch)).cpu()
            total += float(taken.double() @ cost_by_branch.double())
            count += choice_BT.numel()
    return total / count


def _nearest_price(
    model: DuoForCausalLM, router: Router, batches: Sequence[Tensor], budget: float, tolerance: float, slope: float = 0
) -> tuple[float, float]:
    """Search from the router's price on, and set the one that came nearest.

    Args:
        slope: by how much the mean cost changes with the price, if it is known.

    Returns:
        what the router spends at this price, and the slope there; 0 if one run was enough.
    """
    tried: list[tuple[float, float]] = []

    def excess(price: float) -> float:
        router.price.fill_(price)
        tried.append((mean_cost(model, router, batches) - budget, price))
        return tried[-1][0]

    start = router.price.item()
    _find_root(excess, start, slope, tolerance)
    (nearest, price), *others = sorted(tried, key=lambda each: abs(each[0]))
    router.price.fill_(price)
    return budget + nearest, (others[0][0] - nearest) / (others[0][1] - price) if others else 0.0


def _find_root(excess: Callable[[float], float], start: float, slope: float, tolerance: float) -> None:
    """Evaluate a falling function until it is within `tolerance` of 0, or `_MOST_RUNS` times.

    First ever longer steps away from `start` until the sign changes; a known slope (not 0) can shorten the first. Then
    alternately the secant and the middle of the bracket: jumps of the function, where many tokens share a score, stall
    the secant alone.
    """
    price, here = start, excess(start)
    step = _FIRST_STEP + abs(start) / 16
    step = min(step, abs(here / slope)) if slope else step
    step = step if here > 0 else -step
    left, right = (price, here), (price, here)
    for round_ in range(_MOST_RUNS - 1):
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
