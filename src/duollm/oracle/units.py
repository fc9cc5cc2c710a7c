"""Units: one route for several tokens, chosen with all their labels in hand.

Luck averages out within a unit. What is left of the oracle's gain where the unit is long is more than luck, because a
label says little about the mean loss of many tokens.

Shape letters: B sequences, T tokens, N = B * T, R routes, U units, Q cells, K budgets, D hidden.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from duollm.oracle.budgets import Budget, Cells
from duollm.oracle.contexts import Batch
from duollm.oracle.frontier import Frontier
from duollm.oracle.noise import OWN_PREDICTION, LabelSource, draw_labels
from duollm.oracle.reductions import LeafTable, Reduction


class Units(Reduction):
    """The best route of every run of neighbouring tokens within a sequence, for the text and for drawn labels.

    A route's loss is the mean over the tokens of the unit. Their earlier tokens take the routes of the context, as in
    every search. The losses of all routes are held, 12 bytes per token and route, and every leaf runs the full head.

    Attributes:
        sizes: tokens per unit; the last unit of a sequence may be shorter.
        parts: tables of the losses of the text, of y' and of y'' (`DrawnLabels`).
        excess_3N: what is subtracted from them: the surprise of a drawn label, 0 for the text.
    """

    every_route = True
    left_to_right = False
    parts: Sequence[LeafTable] = ()

    def __init__(self, sizes: Sequence[int], source: LabelSource = OWN_PREDICTION) -> None:
        self.sizes, self.source = sizes, source

    def begin(self, batch: Batch, cells: Cells, budgets: Sequence[Budget], generator: torch.Generator) -> None:
        """Draw the labels, and make a table for each."""
        label_2SN, excess_2SN, _ = draw_labels(batch, 1, generator, self.source)
        self.excess_3N = torch.cat([torch.zeros_like(excess_2SN[:1, 0]), excess_2SN[:, 0]])
        counted_N = torch.ones_like(batch.labels_N, dtype=torch.bool)
        self.label_3ND = [batch.label_ND, *batch.model.lm_head.weight[label_2SN[:, 0]]]
        self.parts = [LeafTable(counted_N, cells.space.size, each) for each in self.label_3ND]
        super().begin(batch, cells, budgets, generator)

    def columns(self, frontier: Frontier) -> dict[str, Tensor]:
        """Return, for every size, the losses of each token under the route of its unit.

        `unit8_nll`: chosen for the text and scored on it; `unit8_drawn`: the same with y'; `unit8_second`: chosen for
        y' and scored on y''. The latter two are without their surprise.
        """
        cell_R = self.cells.of_routes(torch.arange(self.cells.space.size, device=self.rows_N.device))
        pairs = zip(self.parts, self.excess_3N, strict=True)
        nll_3NR = [table.nll_MR - excess_N[:, None] for table, excess_N in pairs]
        self.parts = ()
        kept = {}
        for size in self.sizes:
            unit_N = _unit_of(frontier.padding_BT, size)
            for name, chooses, scored in (("nll", 0, 0), ("drawn", 1, 1), ("second", 1, 2)):
                mean_QN, nll_QN = _choose(nll_3NR[chooses], nll_3NR[scored], unit_N, cell_R, len(self.cells.spent))
                kept[f"unit{size}_{name}"] = frontier.read(mean_QN, nll_QN)
        return kept


def _unit_of(padding_BT: Tensor, size: int) -> Tensor:
    """The unit of each token, [N]; padding, at either end of a sequence, is in units that nobody reads."""
    place_BT = (~padding_BT).cumsum(-1).sub(1).clamp(min=0) // size
    units = int(place_BT.max()) + 1
    row_B1 = torch.arange(len(padding_BT), device=padding_BT.device)[:, None]
    return (row_B1 * units + place_BT).masked_fill(padding_BT, len(padding_BT) * units).flatten()


def _choose(chooses_NR: Tensor, scored_NR: Tensor, unit_N: Tensor, cell_R: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """Return, per cell and token, the mean loss of its unit's best route, and what the token loses there, [Q, N]."""
    units = int(unit_N.max()) + 1
    mean_UR = chooses_NR.new_zeros(units, len(cell_R)).index_add_(0, unit_N, chooses_NR)
    mean_UR /= unit_N.bincount(minlength=units).clamp(min=1)[:, None]
    mean_QN = chooses_NR.new_full((cells, len(unit_N)), torch.inf)
    nll_QN = mean_QN.clone()
    for cell in cell_R.unique().tolist():
        routes = (cell_R == cell).nonzero()[:, 0]
        lowest_U, best_U = mean_UR[:, routes].min(-1)
        mean_QN[cell] = lowest_U[unit_N]
        nll_QN[cell] = scored_NR.gather(1, routes[best_U[unit_N]][:, None])[:, 0]
    return mean_QN, nll_QN
