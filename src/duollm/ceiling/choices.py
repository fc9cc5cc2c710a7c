"""From margins of big to branches: at a price, or exactly so many big layers.

Shape letters: J groups of layers. A dot stands for any leading dimensions.
"""

import torch
from torch import Tensor

from duollm.models.branch import Branch
from duollm.routes.space import RouteSpace


def priced_choice(margin: Tensor, otherwise: Tensor, price: float | Tensor) -> Tensor:
    """Return the branches of the groups, [., J]: big where its gain exceeds the price."""
    return torch.where(margin > price, int(Branch.BIG), otherwise)


def per_layer(margin: Tensor, space: RouteSpace) -> Tensor:
    """Repeat the margin of each group, [., J], for each of its layers."""
    return margin.repeat_interleave(torch.tensor(space.group_sizes, device=margin.device), dim=-1)


def exact_choice(margin: Tensor, otherwise: Tensor, big_layers: int, space: RouteSpace) -> Tensor:
    """Return the branches of the groups, [., J]: every token takes exactly `big_layers`, where they gain most in all.

    A dynamic program over the groups, for groups of several sizes need not be taken in the order of their gains.
    """
    wanted = big_layers - space.spent_by_fixed[1]
    best = torch.full((*margin.shape[:-1], wanted + 1), -torch.inf, dtype=torch.float64, device=margin.device)
    best[..., 0] = 0
    taken = []
    for group, layers in enumerate(space.group_sizes):
        with_big = torch.full_like(best, -torch.inf)
        with_big[..., layers:] = best[..., : max(0, wanted + 1 - layers)] + layers * margin[..., group, None].double()
        taken.append(with_big > best)
        best = torch.maximum(best, with_big)
    left, choice = torch.full_like(margin[..., :1], wanted, dtype=torch.int64), otherwise.clone()
    for group in reversed(range(len(taken))):
        big = taken[group].gather(-1, left)
        choice[..., group] = torch.where(big[..., 0], int(Branch.BIG), otherwise[..., group])
        left = left - space.group_sizes[group] * big.long()
    return choice


def price_for(margin: Tensor, big_layers: int, space: RouteSpace) -> float:
    """Return the price at which `big_layers` layers are big on average over tokens."""
    of_layers = per_layer(margin, space)
    spent = round(of_layers.numel() * (big_layers - space.spent_by_fixed[1]) / of_layers.shape[-1])
    descending = of_layers.flatten().sort(descending=True).values
    return float("-inf") if spent == len(descending) else descending[spent].item()
