"""Random routes (exact shares for training, exact budgets for controls, repeatable draws) and regular patterns.

Shape letters: N tokens, L layers, J groups of layers, S sizes of groups, W ways to spend.
"""

from collections.abc import Sequence
from itertools import product
from math import comb, prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from duollm.models.branch import Branch
from duollm.models.dispatch import Dispatch
from duollm.routes.space import RouteSpace, check_big_layers

_MASK = 0xFFFFFFFF


class RandomSplit:
    """Policy of stage 1: at every layer a new permutation sends exact shares of the tokens to each branch.

    Exact shares keep the shapes static, so that nothing waits for the device. (The paper, section 3, draws each token
    independently.) All layers are drawn at construction, so that a layer that is recomputed for gradient checkpointing
    repeats its split.

    Args:
        num_layers: L.
        tokens: N = B * T of the forward pass.
        shares: shares of skip, small and big; their sum is 1.
        generator: source of random numbers; the split is on its device.
    """

    def __init__(self, num_layers: int, tokens: int, shares: Sequence[float], generator: torch.Generator) -> None:
        counts = exact_counts(tokens, shares)
        self.splits = [
            Dispatch.from_order(counts, torch.randperm(tokens, generator=generator, device=generator.device))
            for _ in range(num_layers)
        ]

    def __call__(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> tuple[Dispatch, Any]:
        """Return this layer's split."""
        return self.splits[layer_idx], None


def exact_counts(tokens: int, shares: Sequence[float]) -> tuple[int, int, int]:
    """Return numbers of tokens for skip, small and big, whose sum is `tokens`, each within 1 of its share."""
    skip = round(shares[Branch.SKIP] * tokens)
    small = round((shares[Branch.SKIP] + shares[Branch.SMALL]) * tokens) - skip
    return skip, small, tokens - skip - small


def draw_route_ids(space: RouteSpace, big: int, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Draw ids [*shape] uniformly, with replacement, among the routes with exactly `big` big layers."""
    check_big_layers(space, big)
    device = generator.device
    sizes, of_size, number = np.unique(space.group_sizes, return_inverse=True, return_counts=True)
    others = space.base - (Branch.BIG in space.branches)
    # How many groups of each size are big; if all groups are of one size, there is one way.
    ways = [
        way
        for way in product(*(range(groups + 1) for groups in number))
        if sum(way * sizes) == big - space.spent_by_fixed[1] and (others < space.base or not any(way))
    ]
    way = torch.zeros(*shape, dtype=torch.long, device=device)
    if len(ways) > 1:
        routes_W = [prod(map(comb, number, way)) * others ** (len(of_size) - sum(way)) for way in ways]
        weights_W = torch.tensor([float(routes) for routes in routes_W], device=device)
        way = torch.multinomial(weights_W, way.numel(), replacement=True, generator=generator).view(*shape)
    size_J, first_S = torch.from_numpy(of_size).to(device), torch.tensor([0, *number.cumsum()[:-1]], device=device)
    order = torch.rand(*shape, len(of_size), generator=generator, device=device).double() + size_J
    rank = order.argsort(-1).argsort(-1) - first_S[size_J]  # among the groups of the same size
    other = torch.randint(others, rank.shape, generator=generator, device=device)
    digits = other.where(rank >= torch.tensor(ways, device=device)[way][..., size_J], space.base - 1)
    return (digits * torch.from_numpy(space.place_values).to(device)).sum(-1)


def derived_seed(*numbers: int) -> int:
    """Return a seed that depends on all the given numbers, so that a draw can be repeated without a state."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def uniform_hash(seed: int, position_ids: Tensor, layer_idx: int) -> Tensor:
    """Return numbers in [0, 1), float64, in the shape of `position_ids`; they depend on the arguments alone."""
    state = _mix(torch.full_like(position_ids, seed & _MASK, dtype=torch.int64))
    for number in (position_ids.long(), layer_idx):
        state = _mix((state + number) & _MASK)
    return state.double() / (_MASK + 1)


def _mix(x: Tensor) -> Tensor:
    """Scramble 32-bit integers held in int64 (Wellons' "lowbias32" of hash-prospector)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & _MASK
    x = (x ^ (x >> 15)) * 0x846CA68B & _MASK
    return x ^ (x >> 16)


def spread_layers(big: int, num_layers: int) -> list[int]:
    """Return `big` of `num_layers` layers, evenly spaced."""
    return [(2 * index + 1) * num_layers // (2 * big) for index in range(big)]


def pattern(big_layers: Sequence[int], num_layers: int, otherwise: Branch = Branch.SMALL) -> Tensor:
    """Return the route that is big in these layers and takes another branch elsewhere, [L]."""
    route_L = torch.full((num_layers,), int(otherwise))
    route_L[list(big_layers)] = int(Branch.BIG)
    return route_L
