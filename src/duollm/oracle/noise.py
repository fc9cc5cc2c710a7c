"""Selection noise: what a peek at the label buys, measured on drawn labels that nobody could predict.

`DrawnLabels` repeats the search with labels that are drawn from the model. Two reductions show where the gain of a
search is luck. `DrawnTries`: the more routes are tried, the luckier is the luckiest. `Units`: luck averages out over
the tokens that share a route, so what is left of the gain of long units is more than luck.

Shape letters: B sequences, T tokens, N = B * T, M counted tokens, R routes, Q cells, K budgets, S pairs of labels,
G groups of draws, X numbers of tries, U units, V vocabulary, D hidden.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from duollm.oracle.budgets import Budget, Cells, Exactly, Frontier
from duollm.oracle.contexts import Batch
from duollm.oracle.reductions import BestSoFar, LeafTable, Reduction
from duollm.records.best_of import draw_sizes, expected_best

Floats = NDArray[np.floating]


@dataclass(frozen=True)
class LabelSource:
    """The prediction from which labels are drawn.

    Attributes:
        model: a causal language model of the same vocabulary; None: the searched model, all layers big.
        temperature: divides the logits; below 1, likely words become likelier.
    """

    model: PreTrainedModel | None = None
    temperature: float = 1.0

    def prediction(self, ids_BT: Tensor, own_BTV: Tensor) -> Tensor:
        """Return the probabilities of the next token, float32 [B, T, V].

        Args:
            own_BTV: logits, or log-probabilities, of the searched model with all layers big.
        """
        logits_BTV = own_BTV
        if self.model is not None:  # models of one tokenizer may pad their embeddings to different lengths
            given_BTV = self.model(input_ids=ids_BT, use_cache=False).logits
            logits_BTV = pad(given_BTV, (0, own_BTV.shape[-1] - given_BTV.shape[-1]), value=-torch.inf)
        return (logits_BTV.float() / self.temperature).softmax(-1)


OWN_PREDICTION = LabelSource()


class DrawnLabels(Reduction):
    """Picks routes with labels y' drawn from a prediction, and scores them on second draws y''.

    The oracle picks the best of thousands of routes with the label in hand, so part of its gain is luck. Its gain on y'
    is nothing but luck (docs/oracle.md, "Selection noise").

    The surprise of a drawn label is its nll with all layers big minus the expectation of that nll. It has mean zero
    and is correlated with the label's loss under any route. It is subtracted from the losses as a control variate,
    which leaves their expectation and removes most of the variance.

    Attributes:
        pairs: number S of pairs (y', y'') per position. The columns are means over them.
        source: the prediction from which labels are drawn.
        label_2SN: y' and y''.
        excess_2SN: their surprise, nats.
        parts: the search for every pair.
        expected_ND: the mean of the head's embeddings under the prediction. As a label, it loses what a draw loses in
            expectation.
    """

    every_route = True
    parts: Sequence[BestSoFar] = ()

    def __init__(self, pairs: int = 1, source: LabelSource = OWN_PREDICTION) -> None:
        self.pairs, self.source = pairs, source

    def begin(self, batch: Batch, cells: Cells, budgets: Sequence[Budget], generator: torch.Generator) -> None:
        """Draw the labels; there is a search for every pair."""
        self.label_2SN, self.excess_2SN, self.expected_ND = draw_labels(batch, self.pairs, generator, self.source)
        self.parts = [BestSoFar(*batch.model.lm_head.weight[label_2N]) for label_2N in self.label_2SN.unbind(1)]
        super().begin(batch, cells, budgets, generator)

    def columns(self, frontier: Frontier) -> dict[str, Tensor]:
        """Return the lowest nll of y' and the nll of y'' under the same routes, both minus their surprise.

        The routes themselves are those of the first pair.
        """
        picked_SKBT = torch.stack([frontier.read(each.nll_QN, each.nll_QN) for each in self.parts])
        scored_SKBT = torch.stack([frontier.read(each.nll_QN, each.score_QN) for each in self.parts])
        excess_2SBT = self.excess_2SN[..., self.rows_N].unflatten(-1, frontier.padding_BT.shape)
        return {
            "resampled_nll": (picked_SKBT - excess_2SBT[0][:, None]).mean(0),
            "resampled_route": frontier.read(self.parts[0].nll_QN, self.parts[0].ids_QN),
            "resampled_score": (scored_SKBT - excess_2SBT[1][:, None]).mean(0),
        }


def draw_labels(
    batch: Batch, pairs: int, generator: torch.Generator, source: LabelSource
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw pairs of labels y', y'' from a prediction.

    Returns:
        The labels and their surprise in nats, each [2, S, N], and the prediction's mean embedding in the head [N, D].
    """
    own_BTV = batch.model(input_ids=batch.ids_BT, use_cache=False).logits.float()
    prediction_NV = source.prediction(batch.ids_BT, own_BTV).flatten(0, 1)
    nll_NV = -own_BTV.log_softmax(-1).flatten(0, 1)
    drawn_NS = torch.multinomial(prediction_NV, 2 * pairs, replacement=True, generator=generator)
    excess_NS = nll_NV.gather(1, drawn_NS) - (prediction_NV * nll_NV).sum(-1, keepdim=True)
    label_2SN, excess_2SN = (each.T.unflatten(0, (2, pairs)) for each in (drawn_NS, excess_NS))
    weight_VD = batch.model.lm_head.weight
    return label_2SN, excess_2SN, prediction_NV.to(weight_VD.dtype) @ weight_VD


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
