"""The frontier: each token's best route in every cell, from which budgets are read.

Shape letters: Q cells, N tokens, K budgets, B sequences, T tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from duollm.oracle.budgets import Budget, Cells, pick


def cell_of(cells: Cells, small: Tensor, big: Tensor) -> Tensor:
    """The cells of routes with so many small and big layers, as indices into `cells.spent`."""
    layers = cells.space.num_layers
    index = torch.zeros(layers + 1, layers + 1, dtype=torch.long)
    for cell, spent in enumerate(cells.spent):
        index[spent] = cell
    return index.to(big.device)[small, big]


def read_frontier(
    budgets: Sequence[Budget],
    cells: Cells,
    nll_QN: Tensor,
    wanted_QN: Tensor,
    padding_BT: Tensor,
    first_position: int = 0,
) -> Tensor:
    """Read the oracle of every budget off the frontier, [K, B, T]; nan (or -1) at padding.

    Args:
        nll_QN: best nll (nats) of each cell, N = B * T, +inf where a cell was not searched.
        wanted_QN: what is wanted of the best cell: its nll, its route ids.
        padding_BT: tokens that neither spend nor count.
        first_position: position of the first of the T tokens in the sequence.
    """
    nll_QBT, wanted_QBT = (each.view(-1, *padding_BT.shape) for each in (nll_QN, wanted_QN))
    picked = [pick(budget, cells, nll_QBT, wanted_QBT, first_position, padding_BT) for budget in budgets]
    nothing = torch.nan if wanted_QN.is_floating_point() else -1
    return torch.stack(picked).masked_fill(padding_BT, nothing)
