"""Fixed patterns: one route for all tokens, chosen honestly and compared on equal footing.

A pattern is chosen on one half of the documents and scored on the other half, and the other way
round, so every document is scored once and never by a choice it took part in.

Shape letters: D documents, R routes (patterns of one budget), N sizes of a draw.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from duollm.analysis.statistics import Floats
from duollm.analysis.tables import OracleTable, PatternTable
from duollm.models.branch import Branch
from duollm.oracle.order import chance_of_best


def best_of(nll_sum_DR: Floats, drawn: Sequence[int], in_first_D: NDArray[np.bool_]) -> Floats:
    """Return the expected nll sum [N, D] of the best of `drawn` distinct random patterns, cross-fitted.

    The expectation over draws is exact. With fewer patterns than draws all are drawn; then, and
    in general with drawn = R, this is the best of all patterns.
    """
    patterns = nll_sum_DR.shape[1]
    chance_NR = np.stack([chance_of_best(patterns, min(size, patterns)) for size in drawn])
    totals_ND = np.empty((len(drawn), len(nll_sum_DR)))
    for scored_D in (in_first_D, ~in_first_D):
        ranking_R = np.argsort(nll_sum_DR[~scored_D].sum(0), kind="stable")
        totals_ND[:, scored_D] = chance_NR @ nll_sum_DR[np.ix_(scored_D, ranking_R)].T
    return totals_ND


def static(nll_sum_DR: Floats, in_first_D: NDArray[np.bool_]) -> Floats:
    """Return the nll sum [D] of the best pattern, cross-fitted."""
    return np.asarray(best_of(nll_sum_DR, [nll_sum_DR.shape[1]], in_first_D)[0])


def whole_document_sums(oracle: OracleTable, patterns: PatternTable) -> Floats:
    """Return every pattern's nll sum [D, R] over all tokens of each document, from its sums over those counted.

    A plain scaling would compare a pattern on its few tokens with an oracle on all. All small and
    all big are known on both, so they tell how hard the counted tokens happened to be (a difference
    estimator): sum over all = anchor over all + tokens / counted * (pattern - anchor over counted),
    where the anchor of a pattern with k of L layers big is (1 - k/L) all small + k/L all big. It is
    unbiased, and exact for all small, for all big, and where every token is counted.
    """
    tokens_D = oracle.tokens_D
    if np.array_equal(patterns.counted_D, tokens_D):
        return patterns.nll_sum_DR
    big_share_R = oracle.space.count_big(patterns.route_R) / oracle.space.num_layers
    estimate_DR = (tokens_D / patterns.counted_D)[:, None] * patterns.nll_sum_DR
    for branch, nll_T, weight_R in (
        (Branch.SMALL, oracle.nll_small_T, 1 - big_share_R),
        (Branch.BIG, oracle.nll_big_T, big_share_R),
    ):
        if branch not in oracle.space.branches:
            continue
        same_everywhere = oracle.space.encode(np.full(oracle.space.num_layers, branch))
        counted_D = patterns.nll_sum_DR[:, np.searchsorted(patterns.route_R, same_everywhere)]
        all_D = oracle.by_document(nll_T)
        estimate_DR += np.outer(all_D - tokens_D / patterns.counted_D * counted_D, weight_R)
    return estimate_DR
