"""What the search would have found, had it tried only some random routes: expectations from the losses of all routes.

The more routes are tried with the label in hand, the luckier the luckiest. The same is measured for drawn labels, so
that gain and luck can be compared at every number of tries.

Shape letters: N tokens, M counted tokens, R routes, S pairs of drawn labels, G groups of draws, X numbers of tries,
D hidden.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from duollm.oracle.budgets import Budget, Cells, Exactly
from duollm.oracle.contexts import Batch
from duollm.oracle.frontier import Frontier
from duollm.oracle.noise import DrawnLabels
from duollm.oracle.reductions import LeafTable, Reduction
from duollm.records.best_of import draw_sizes, expected_best

Floats = NDArray[np.floating]


class DrawnTries(Reduction):
    """Losses of drawn labels at the counted tokens, had only some random routes of a budget been tried.

    The losses of all routes are held while a window is searched, 4 bytes per counted token, route and label.

    Attributes:
        counted_N: True at the tokens that run the full head on every route in any case.
        drawn: gives the labels, and must come before in the search.
        sums: per number of big layers, sums over the counted tokens, nats [X], for X = `draw_sizes(R)` tries:
            `drawn{S}_sum`: the lowest mean loss of S labels y' of the same token, minus their surprise;
            `second{S}_sum`: the mean loss of as many y'' under these routes; `expected_sum`: the lowest expected loss.
    """

    every_route = True
    left_to_right = False
    parts: Sequence[LeafTable] = ()

    def __init__(self, counted_N: Tensor, drawn: DrawnLabels) -> None:
        self.counted_N, self.drawn = counted_N, drawn
        self.sums: dict[int, dict[str, Floats]] = {}

    def begin(self, batch: Batch, cells: Cells, budgets: Sequence[Budget], generator: torch.Generator) -> None:
        """Make a table for every label."""
        self._big_layers = [budget.big for budget in budgets if isinstance(budget, Exactly)]
        labels = [label_ND for best in self.drawn.parts for label_ND in (best.given_ND, best.scored_ND)]
        self.parts = [LeafTable(self.counted_N, cells.space.size, each) for each in (*labels, self.drawn.expected_ND)]
        super().begin(batch, cells, budgets, generator)

    def columns(self, frontier: Frontier) -> dict[str, Tensor]:
        """Keep the sums, and free the tables."""
        *first_and_second, expected_MR = (table.nll_MR.cpu().numpy() for table in self.parts)
        self.parts = ()
        excess_2SM1 = self.drawn.excess_2SN[..., self.counted_N, None].cpu().numpy()
        first_SMR, second_SMR = (
            np.stack(first_and_second[place::2]) - excess_SM1 for place, excess_SM1 in enumerate(excess_2SM1)
        )
        big_R = self.cells.space.count_big(torch.arange(self.cells.space.size)).numpy()
        for big in self._big_layers:
            of_budget_R = big_R == big
            first, second, expected = (each[..., of_budget_R] for each in (first_SMR, second_SMR, expected_MR))
            self.sums[big] = _sums(first, second, expected)
        return {}


def _sums(first_SMR: Floats, second_SMR: Floats, expected_MR: Floats) -> dict[str, Floats]:
    """Choose routes by the mean losses of 1, 2, 4, ... labels; the mean over groups of so many labels."""
    pairs, sizes = len(first_SMR), draw_sizes(expected_MR.shape[1])
    sums = {"expected_sum": expected_best(expected_MR, sizes).sum(1)}
    for labels in (2**power for power in range(pairs.bit_length())):
        groups = pairs // labels
        first_GMR, second_GMR = (
            each[: groups * labels].reshape(groups, labels, *each.shape[1:]).mean(1) for each in (first_SMR, second_SMR)
        )
        chosen = [expected_best(each, sizes).sum(1) for each in first_GMR]
        scored = [
            expected_best(first, sizes, second).sum(1) for first, second in zip(first_GMR, second_GMR, strict=True)
        ]
        sums |= {f"drawn{labels}_sum": np.mean(chosen, axis=0), f"second{labels}_sum": np.mean(scored, axis=0)}
    return sums


def best_of_columns(
    nll_of: Mapping[str, NDArray[np.float32]],
    big_R: NDArray[np.int64],
    big_layers: Sequence[int],
    drawn_of: Mapping[str, Sequence[DrawnTries]],
) -> dict[str, list[object]]:
    """Return the columns of best_of.parquet: a row per document, budget and number of tries (docs/formats.md).

    Args:
        nll_of: losses [M, R] of the counted tokens of every document.
        big_R: the numbers of big layers of these routes.
        drawn_of: searches for drawn labels, one per window of every document; empty where none were made.
    """
    rows: list[dict[str, object]] = []
    for document, nll_MR in nll_of.items():
        for big in big_layers:
            nll_of_budget = nll_MR[:, big_R == big]
            sizes = draw_sizes(nll_of_budget.shape[1])
            sums: dict[str, Floats] = {"nll_sum": expected_best(nll_of_budget, sizes).sum(1)}
            windows = [each.sums[big] for each in drawn_of.get(document, ())]
            for name in windows[0] if windows else ():
                sums[name] = np.sum([window[name] for window in windows], axis=0)
            row = {"document": document, "big_layers": big, "tokens": len(nll_MR)}
            rows += [
                row | {"drawn": size} | {name: float(values[place]) for name, values in sums.items()}
                for place, size in enumerate(sizes)
            ]
    return {name: [row[name] for row in rows] for name in rows[0]}
