"""Fixed patterns: one route for all tokens, chosen on other documents than those it is scored on.

A pattern is chosen on one half of the documents and scored on the other half, and the other way round. So every
document is scored once, and never by a choice it took part in.

Shape letters: D documents, R routes (patterns), N sizes of a draw.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from duollm.errors import UserError
from duollm.models.branch import Branch
from duollm.records.best_of import chance_of_best
from duollm.records.bootstrap import Floats, Integers
from duollm.records.files import KINDS, ResultFile
from duollm.records.keys import ALL_BIG, ALL_SMALL, Key
from duollm.records.tokens import Tokens
from duollm.routes.space import RouteSpace


@dataclass(frozen=True)
class PatternSums:
    """The loss of every fixed route on a sample of every document's tokens, the same sample for all routes.

    Attributes:
        route_R: route ids, ascending.
        nll_DR: sums of nll over the counted tokens, nats.
        counted_D: number of counted tokens of each document.
    """

    documents: list[str]
    space: RouteSpace
    route_R: Integers
    nll_DR: Floats
    counted_D: Integers

    def by_budget(self, nll_DR: Floats | None = None) -> Iterator[tuple[int, Floats]]:
        """Yield each number of big layers with the nll sums [D, R] of its patterns."""
        big_R = self.space.count_big(self.route_R)
        for k in np.unique(big_R):
            yield int(k), (self.nll_DR if nll_DR is None else nll_DR)[:, big_R == k]

    def uniform(self, branch: Branch) -> Floats | None:
        """Return the nll sums [D] of the pattern that takes one branch at all layers, or None if it was not run."""
        route = self.space.uniform(branch)
        if route is None:
            return None
        places = np.flatnonzero(self.route_R == route)
        return self.nll_DR[:, places[0]] if len(places) else None


def pattern_columns(documents: Sequence[str], route_R: Integers, nll_DR: Floats, counted_D: Integers) -> dict[str, Any]:
    """Return the columns of the file that holds `PatternSums`: a row per document and pattern."""
    return {
        "document": np.repeat(documents, len(route_R)),
        "route": np.tile(route_R, len(documents)),
        "nll_sum": nll_DR.flatten(),
        "tokens": np.repeat(counted_D, len(route_R)).astype(np.int32),
    }


def read_patterns(run: Path, oracle: Tokens) -> PatternSums:
    """Read oracle/<domain>.routes.parquet, documents in the order of `oracle`.

    Raises:
        UserError: the file is missing, incomplete, or belongs to other tokens.
    """
    path = run / "oracle" / f"{oracle.domain}{KINDS['routes']}.parquet"
    file = ResultFile.open(path, "duollm oracle", path.parent)
    if set(file.documents()[0]) != set(oracle.documents):
        raise UserError(f"{path}: its documents are not those of {oracle.file.path}; {file.again}")
    patterns = _patterns(file, oracle.documents)
    fewest_D = oracle.tokens_D if file.fact("counted_share") == 1 else 1
    if (patterns.counted_D < fewest_D).any() or (patterns.counted_D > oracle.tokens_D).any():
        raise UserError(f"{path}: its token counts are not those of {oracle.file.path}; {file.again}")
    return patterns


def read_compared_patterns(run: Path, domain: str) -> PatternSums | None:
    """Read evaluate/<domain>.routes.parquet; None if no policy was run on more text than the oracle's.

    Raises:
        UserError: the file is foreign or incomplete.
    """
    path = run / "evaluate" / f"{domain}{KINDS['routes']}.parquet"
    if not path.exists():
        return None
    file = ResultFile.open(path, "duollm evaluate", path.parent)
    return _patterns(file, file.documents()[0])


def _patterns(file: ResultFile, documents: list[str]) -> PatternSums:
    """Read the sums of all routes, documents in the given order."""
    names, own_document = file.documents()
    document = np.array([documents.index(name) for name in names])[own_document]
    route_R, column = np.unique(file.route_ids("route"), return_inverse=True)
    nll_DR = np.full((len(names), len(route_R)), np.nan)
    nll_DR[document, column] = file.floats("nll_sum")
    counted_D = np.zeros(len(names), dtype=np.int64)
    counted_D[document] = file.integers("tokens")
    if np.isnan(nll_DR).any():
        raise UserError(f"{file.path}: some documents lack some routes; {file.again}")
    return PatternSums(documents, file.space(), route_R, nll_DR, counted_D)


def first_half(documents: int, seed: int) -> NDArray[np.bool_]:
    """Return which documents [D] belong to the first half of a seeded random split.

    Raises:
        UserError: fewer than two documents.
    """
    if documents < 2:
        raise UserError(
            "a fixed pattern is chosen on one half of the documents and scored on the other, "
            f"which needs at least 2 documents per domain, got {documents}"
        )
    order = np.random.default_rng(seed).permutation(documents)
    return np.asarray(np.isin(np.arange(documents), order[: documents // 2]))


def best_on_other_half(nll_sum_DR: NDArray[np.float64], in_first_D: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return for each document [D] the index of the route with the lowest sum over the other half.

    Ties go to the first route.
    """
    best = {half: int(nll_sum_DR[in_first_D == half].sum(0).argmin()) for half in (True, False)}
    return np.asarray([best[not half] for half in in_first_D.tolist()])


def best_of(nll_DR: Floats, drawn: Sequence[int], in_first_D: NDArray[np.bool_]) -> Floats:
    """Return the expected nll sum [N, D] of the best of `drawn` distinct random patterns, cross-fitted.

    The expectation over draws is exact. If `drawn` is at least the number of patterns, this is the best of all
    patterns.
    """
    patterns = nll_DR.shape[1]
    chance_NR = np.stack([chance_of_best(patterns, min(size, patterns)) for size in drawn])
    totals_ND = np.empty((len(drawn), len(nll_DR)))
    for scored_D in (in_first_D, ~in_first_D):
        ranking_R = np.argsort(nll_DR[~scored_D].sum(0), kind="stable")
        totals_ND[:, scored_D] = chance_NR @ nll_DR[np.ix_(scored_D, ranking_R)].T
    return totals_ND


def static(nll_DR: Floats, in_first_D: NDArray[np.bool_]) -> Floats:
    """Return the nll sum [D] of the best pattern, cross-fitted."""
    return np.asarray(best_of(nll_DR, [nll_DR.shape[1]], in_first_D)[0])


def whole_document_sums(oracle: Tokens, patterns: PatternSums) -> Floats:
    """Estimate every pattern's nll sum [D, R] over all tokens of each document from its sums over the counted ones.

    Plain scaling would compare a pattern on few tokens with an oracle on all. All small and all big are known on both,
    so they tell how hard the counted tokens happened to be. The difference estimator is

        sum over all = anchor over all + tokens / counted * (pattern - anchor over counted),

    where the anchor of a pattern with k of L layers big is (1 - k/L) all small + k/L all big. It is unbiased, and exact
    for all small, for all big, and if every token is counted.
    """
    tokens_D, layers = oracle.tokens_D, oracle.space.num_layers
    if np.array_equal(patterns.counted_D, tokens_D):
        return patterns.nll_DR
    scale_D = tokens_D / patterns.counted_D
    estimate_DR = scale_D[:, None] * patterns.nll_DR
    big_share_R = oracle.space.count_big(patterns.route_R) / layers
    for branch, key, weight_R in (
        (oracle.space.lowest, Key(ALL_SMALL, 0), 1 - big_share_R),
        (Branch.BIG, Key(ALL_BIG, layers), big_share_R),
    ):
        counted_D = patterns.uniform(branch)
        if counted_D is not None:
            all_D = oracle.by_document(oracle.policies[key].nll_T)
            estimate_DR += np.outer(all_D - scale_D * counted_D, weight_R)
    return estimate_DR
