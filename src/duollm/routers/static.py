"""Static as the prior of routers and of the ceiling: the best pattern of a budget, and what each group is worth there.

Marginal gains are slopes. Where a model was never trained to do without its layers, the slope at a layer says little
about what happens without it: what follows normalises the sum to which the layer added. Then the mean gains rank
layers worse than the losses of patterns do, and whoever trusts them loses against static. Here the mean comes from
measured losses, and predicted gains only say how tokens differ from it.

Shape letters: B batch, T tokens, L layers, J groups of layers, D hidden.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from duollm.measure.executor import policy_losses
from duollm.models.branch import Branch
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.routers.base import Router
from duollm.routers.calibration import budget_of, calibrate
from duollm.routers.marginal import GAIN_SCALE
from duollm.routes.space import RouteSpace, check_big_layers

SCALES = (1.0, 0.25, 0.0)
"""By how much a predicted difference between tokens counts; the value is chosen on validation text. 0 is static."""
_WINDOWS = 16
_TIE = 1e-3  # nats x 100
_ALWAYS = 1e9


@dataclass(frozen=True)
class Prior:
    """A pattern, and what the groups are worth beside it.

    Attributes:
        route_L: the pattern.
        worth_J: by how much the mean loss rises if a group with big gives it up, or falls if another takes it, in nats
            x 100 per token and layer. Every group with big is worth more than every other.
        price: between the two.
    """

    route_L: Tensor
    worth_J: Tensor
    price: float


def static_priors(
    model: DuoForCausalLM, space: RouteSpace, token_ids_WT: Tensor, big_layers: Sequence[int]
) -> dict[int, Prior]:
    """Search the best pattern of every budget on some text.

    From all big on, the group whose loss per layer is least gives up big, until the budget is met; then a pair of
    groups changes places as long as that lowers the loss. That takes about J^2 / 2 runs of the text in all.

    Args:
        token_ids_WT: validation text, [W, T], of which the first 16 windows are taken.
        big_layers: the budgets.

    Raises:
        ValueError: a budget is impossible, or there are three branches.
    """
    if space.base != 2:
        raise ValueError(f"static as the prior needs two branches, got {[branch.name for branch in space.branches]}")
    known: dict[frozenset[int], float] = {}
    token_ids_WT = token_ids_WT[:_WINDOWS]

    def route_of(big: frozenset[int]) -> Tensor:
        chosen = [space.branches[group in big] for group in range(len(space.leaders))]
        return space.spread(torch.tensor(chosen, device=model.device))

    def loss(big: frozenset[int]) -> float:
        if big not in known:
            known[big] = policy_losses(model, token_ids_WT, routes=route_of(big))[0].mean().item()
        return known[big]

    found = {}
    for k in big_layers:
        check_big_layers(space, k)
        big = _descend(space, k, loss)
        worth = _worth(space, big, loss)
        while len(big) < len(worth) and big:
            weakest = min(big, key=lambda group: worth[group])
            strongest = max((group for group in range(len(worth)) if group not in big), key=lambda group: worth[group])
            swapped = big - {weakest} | {strongest}
            if space.group_sizes[weakest] != space.group_sizes[strongest] or loss(swapped) >= loss(big):
                break
            big, worth = swapped, _worth(space, swapped, loss)
        found[k] = _prior(route_of(big), [group in big for group in range(len(worth))], worth)
    return found


def _descend(space: RouteSpace, big_layers: int, loss: Any) -> frozenset[int]:
    """Take big from one group after another, as long as the rest can still add up to the budget."""
    sizes, wanted = space.group_sizes, big_layers - space.spent_by_fixed[1]
    big = frozenset(range(len(sizes)))
    while sum(sizes[group] for group in big) > wanted:
        fewer = [(group, big - {group}) for group in sorted(big)]
        fewer = [(group, rest) for group, rest in fewer if wanted in _sums([sizes[each] for each in rest])]
        big = min(fewer, key=lambda each: (loss(each[1]) - loss(big)) / sizes[each[0]])[1]
    return big


def _sums(sizes: Sequence[int]) -> set[int]:
    sums = {0}
    for size in sizes:
        sums |= {each + size for each in sums}
    return sums


def _worth(space: RouteSpace, big: frozenset[int], loss: Any) -> list[float]:
    """What the big branch is worth at each group if the others stay as they are, nats x 100 per layer."""
    changes = [loss(big - {group}) - loss(big | {group}) for group in range(len(space.leaders))]
    return [GAIN_SCALE * change / layers for change, layers in zip(changes, space.group_sizes, strict=True)]


def _prior(route_L: Tensor, is_big: Sequence[bool], worth: Sequence[float]) -> Prior:
    """Put the price in the middle between the groups with big and the others, and part those that overlap."""
    worth_J, big_J = torch.tensor(worth), torch.tensor(is_big)
    least = worth_J[big_J].min().item() if any(is_big) else max(worth) + 1
    most = worth_J[~big_J].max().item() if not all(is_big) else min(worth) - 1
    price = (least + most) / 2
    parted_J = torch.where(big_J, worth_J.clamp(min=price + _TIE), worth_J.clamp(max=price - _TIE))
    return Prior(route_L, parted_J.to(route_L.device), price)


@torch.inference_mode()
def calibrate_around(
    model: DuoForCausalLM, router: Router, batches: Sequence[Tensor], prior: Prior, big_layers: int
) -> float:
    """Set price and offsets of a router of gains so that its mean margins are those of the prior.

    A group is big where worth + scale x (margin - mean margin) exceeds the price, and `chosen_scale` chooses the scale
    on `batches`. So on this text no router is worse than static.

    Args:
        batches: token ids [B, T] each, from validation documents.

    Returns:
        The mean cost on `batches`, as `calibrate` does.
    """
    router.eval()
    leaders, budget = router.space.leaders, budget_of(model.config, router, big_layers)
    static_WT, mean_J = _along(model, router, batches, prior.route_L)
    losses = {0.0: static_WT}
    found = {0.0: (budget, 0.0, (prior.price - prior.worth_J).sign() * _ALWAYS)}
    for scale in filter(None, SCALES):
        offset_J = mean_J - prior.worth_J / scale
        router.offset_L.zero_()[leaders] = offset_J
        router.price.fill_(prior.price / scale)
        spent = calibrate(model, router, batches, budget)
        losses[scale] = torch.cat([policy_losses(model, each, policy=router.policy())[0] for each in batches])
        found[scale] = spent, router.price.item(), offset_J
    spent, price, router.offset_L[leaders] = found[chosen_scale(losses)]
    router.price.fill_(price)
    return spent


def chosen_scale(losses: Mapping[float, Tensor]) -> float:
    """Return the scale that surely gains most over static: the mean gain less its standard error over windows.

    Args:
        losses: by scale, nats [W, T - 1]. That of scale 0 are static's.
    """
    gain_W = {scale: (losses[0.0] - nll_WT).mean(1) for scale, nll_WT in losses.items()}
    sure = {scale: (each.mean() - each.std() * len(each) ** -0.5).item() for scale, each in gain_W.items() if scale}
    return max([scale for scale in sure if sure[scale] > 0], key=lambda scale: sure[scale], default=0.0)


def _along(model: DuoForCausalLM, router: Router, batches: Sequence[Tensor], route_L: Tensor) -> tuple[Tensor, Tensor]:
    """Losses of a pattern, [W, T - 1], and the mean margins of big along it, [J]."""
    margins, losses = list[list[Tensor]](), []

    class Along:
        """Takes the pattern; the router remembers it as its own choices."""

        def begin(self, position_ids_BT: Tensor) -> Any:
            margins.append([])
            return router.begin(position_ids_BT)

        def __call__(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> tuple[Tensor, Any]:
            margin_BT, _, memory = router.margin(layer_idx, states_BTD, memory)
            margins[-1].append(margin_BT.mean())
            choice_BT = route_L[layer_idx].expand(states_BTD.shape[:2])
            return choice_BT, router.remember(layer_idx, choice_BT, memory)

    for batch_BT in batches:
        losses.append(policy_losses(model, batch_BT, policy=router.policy(Along()))[0])
    return torch.cat(losses), torch.stack([torch.stack(each) for each in margins]).mean(0)


def patterns_of(priors: Mapping[int, Prior], space: RouteSpace) -> tuple[Tensor, Tensor]:
    """Return the patterns, [R, L], and the share of big among the layers that vary in each, [R]."""
    routes_RL = torch.stack([prior.route_L for prior in priors.values()])
    vary = [layer for layers in space.group_layers for layer in layers]
    return routes_RL, (routes_RL[:, vary] == Branch.BIG).float().mean(-1)
