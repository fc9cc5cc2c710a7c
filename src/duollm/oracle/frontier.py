"""The frontier: the best loss of every cell and token, from which the best of every budget is read.

Shape letters: Q cells, N tokens, K budgets, B sequences, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from duollm.oracle.budgets import Budget, Cells, OnAverage


@dataclass(frozen=True)
class Frontier:
    """Finds the best cell of every budget in what was kept per cell and token; N = B * T.

    Attributes:
        padding_BT: padding, which neither spends nor counts.
        first_position: position of the first of the T tokens in the sequence.
    """

    budgets: Sequence[Budget]
    cells: Cells
    padding_BT: Tensor
    first_position: int = 0

    def read(self, nll_QN: Tensor, wanted_QN: Tensor) -> Tensor:
        """Read values of the best cell of every budget, [K, B, T]; nan (or -1) at padding. Ties go to the cheaper cell.

        Args:
            nll_QN: best nll (nats) of each cell, +inf where a cell was not searched.
            wanted_QN: the values to read in the best cell, such as its nll or its route ids.
        """
        nll_QBT, wanted_QBT = (each.view(-1, *self.padding_BT.shape) for each in (nll_QN, wanted_QN))
        chosen_KBT = torch.stack([self._choose(budget, nll_QBT) for budget in self.budgets])
        nothing = torch.nan if wanted_QN.is_floating_point() else -1
        return wanted_QBT.gather(0, chosen_KBT).masked_fill(self.padding_BT, nothing)

    def _choose(self, budget: Budget, nll_QBT: Tensor) -> Tensor:
        """The best cell within a budget, [B, T]."""
        if isinstance(budget, OnAverage):
            chosen_BT = torch.zeros_like(nll_QBT[0], dtype=torch.long)
            counted_BT = ~self.padding_BT
            chosen_BT[counted_BT] = _split_between_tokens(budget.big, self.cells, nll_QBT[:, counted_BT])
            return chosen_BT
        positions = range(self.first_position, self.first_position + nll_QBT.shape[-1])
        allowed_QT = self.cells.allowed(budget, positions).to(nll_QBT.device, non_blocking=True)
        return _first_lowest(nll_QBT.masked_fill(~allowed_QT[:, None], torch.inf))


def _first_lowest(values: Tensor) -> Tensor:
    """Index of the lowest value along the first axis, the first of equals (argmin promises no order)."""
    lowest = values.amin(0, keepdim=True)
    positions = torch.arange(len(values), device=values.device).view(-1, *[1] * (values.ndim - 1))
    return positions.where(values == lowest, len(values)).amin(0)


def _split_between_tokens(mean_big: float, cells: Cells, nll_QN: Tensor) -> Tensor:
    """Cells per token that minimise the total nll with `mean_big` big layers on average, [N].

    A price per big layer makes every token choose for itself (the Lagrangian); the total spent falls
    as the price rises. Bisection finds the price at which the tokens spend just what is allowed; what
    a step of the price leaves unspent goes, one token at a time, to those that gain most per layer.
    """
    big_Q = torch.tensor([float(big) for _, big in cells.spent], device=nll_QN.device)
    limit = mean_big * nll_QN.shape[1]

    def choose(price: float) -> Tensor:
        return _first_lowest(nll_QN.double() + price * big_Q[:, None])

    low, high = 0.0, 1.0
    if big_Q[choose(0.0)].sum() <= limit:
        return choose(0.0)
    while big_Q[choose(high)].sum() > limit:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if big_Q[choose(middle)].sum() > limit else (low, middle)
    split_N = _spend_rest(choose(high), choose(low), nll_QN, big_Q, limit)
    alike_N = _first_lowest(nll_QN.masked_fill(big_Q[:, None] > mean_big, torch.inf))
    # The price can miss by a token's step; with few tokens, the same limit for all may then be better.
    return min((split_N, alike_N), key=lambda cell_N: nll_QN.gather(0, cell_N[None]).sum().item())


def _spend_rest(frugal_N: Tensor, lavish_N: Tensor, nll_QN: Tensor, big_Q: Tensor, limit: float) -> Tensor:
    """Move tokens from their frugal to their lavish cell while it fits, then wherever the rest still helps."""
    extra_N = big_Q[lavish_N] - big_Q[frugal_N]
    gain_N = (nll_QN.gather(0, frugal_N[None]) - nll_QN.gather(0, lavish_N[None]))[0]
    order = (gain_N / extra_N.clamp(min=1)).argsort(descending=True)
    order = order[extra_N[order] > 0]
    fits = big_Q[frugal_N].sum() + extra_N[order].cumsum(0) <= limit
    chosen_N = frugal_N.clone()
    chosen_N[order[fits]] = lavish_N[order[fits]]
    while True:
        left = limit - big_Q[chosen_N].sum()
        gain_QN = nll_QN.gather(0, chosen_N[None]) - nll_QN
        gain_QN[big_Q[:, None] - big_Q[chosen_N] > left] = 0
        best = int(gain_QN.argmax())
        if gain_QN.flatten()[best] <= 0:
            return chosen_N
        chosen_N[best % nll_QN.shape[1]] = best // nll_QN.shape[1]
