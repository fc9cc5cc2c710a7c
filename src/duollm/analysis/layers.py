"""Layer use, agreement of routers with the oracle, and difficulty of tokens.

Shape letters: T tokens, L layers, P bins of positions, X draws of the bootstrap.
"""

from collections.abc import Iterator

import numpy as np

from duollm.analysis.results import AgreementRow, DifficultyRow, LayerUseRow, fields_of
from duollm.models.branch import Branch
from duollm.records.bootstrap import Bootstrap, Floats, Integers, interval, intervals, sum_by_document
from duollm.records.keys import ALL_SMALL, ORACLE, Key
from duollm.records.records import AGREEING, BRANCHES, Draws
from duollm.records.tokens import Tokens

HIGH_LOSS_QUANTILE = 0.75


def layer_use_rows(draws: Draws, tokens: Tokens, edges: Integers) -> Iterator[LayerUseRow]:
    """Yield the share of tokens whose layer is big, by depth and position, for the oracle and every router."""
    for quantity, key in draws.records.sums:
        if quantity == BRANCHES:
            share_XL = draws.mean(BRANCHES, key)[:, :, Branch.BIG]
            share_LP = share_by_position(tokens.policies[key].routes_TL, tokens.position_T, edges)
            yield LayerUseRow(
                **fields_of(draws.records.domain, key),
                share_by_layer=intervals(share_XL),
                position_edges=edges.tolist(),
                share_by_layer_and_position=share_LP.tolist(),
            )


def position_edges(position_T: Integers, most_bins: int = 8) -> Integers:
    """Return P + 1 edges that cut the observed positions into bins of (nearly) equal width.

    Bin p holds the positions edges[p] <= t < edges[p + 1]; the last edge is one past the last position.
    """
    first, last = int(position_T.min()), int(position_T.max())
    bins = min(most_bins, last - first + 1)
    return np.round(np.linspace(first, last + 1, bins + 1)).astype(np.int64)


def share_by_position(routes_TL: Integers, position_T: Integers, edges: Integers) -> Floats:
    """Return the share of tokens whose layer is big, by layer and bin of positions: [L, P]."""
    bin_T, is_big_TL = np.searchsorted(edges, position_T, side="right") - 1, (routes_TL == Branch.BIG).astype(float)
    big_PL = sum_by_document(is_big_TL, bin_T, len(edges) - 1)
    return np.asarray((big_PL / np.bincount(bin_T, minlength=len(edges) - 1)[:, None]).T)


def agreement_rows(draws: Draws) -> Iterator[AgreementRow]:
    """Yield the share of tokens on which a router and the oracle of its budget agree, per layer and overall.

    Beside it is the agreement by chance of two choosers with the same shares per layer. The context is the main one.
    """
    for quantity, key in draws.records.sums:
        if quantity == AGREEING:
            oracle = Key(ORACLE, key.big_layers, context=draws.records.context)
            same_XL = draws.mean(AGREEING, key)
            chance_XL = (draws.mean(BRANCHES, key) * draws.mean(BRANCHES, oracle)).sum(2)
            yield AgreementRow(
                **fields_of(draws.records.domain, key),
                share=float(same_XL[0].mean()),
                share_if_independent=float(chance_XL[0].mean()),
                over_independent=interval((same_XL - chance_XL).mean(1)),
                share_by_layer=intervals(same_XL),
                share_if_independent_by_layer=chance_XL[0].tolist(),
            )


def difficulty(tokens: Tokens, big_layers: int) -> tuple[Floats, Floats]:
    """Return, per token [T], the loss of all small and by how much the oracle of a budget lowers it, nats."""
    nll_small_T = tokens.policies[Key(ALL_SMALL, 0)].nll_T
    return nll_small_T, nll_small_T - tokens.oracle(big_layers).nll_T


def difficulty_rows(tokens: Tokens, bootstrap: Bootstrap) -> Iterator[DifficultyRow]:
    """Yield, per budget, how loss and difficulty relate (paper, figure 5)."""
    for k in tokens.searched():
        if tokens.space.big_layers[0] < k < tokens.space.big_layers[-1]:
            nll_small_T, gain_T = difficulty(tokens, k)
            share_X = hard_without_gain(nll_small_T, gain_T, tokens.document_T, bootstrap)
            yield DifficultyRow(tokens.domain, k, float(np.median(gain_T)), interval(share_X))


def hard_without_gain(nll_small_T: Floats, gain_T: Floats, document_T: Integers, bootstrap: Bootstrap) -> Floats:
    """Return the share of high-loss tokens that gain less than the median token, draws [X].

    High loss means the top quarter of nll under all small. The share would be 0 if difficulty were the loss itself, and
    0.5 if the two were unrelated. Both thresholds come from the data and stay fixed over the resamples.
    """
    high_T = nll_small_T >= np.quantile(nll_small_T, HIGH_LOSS_QUANTILE)
    wasted_T = high_T & (gain_T < np.median(gain_T))
    counts_DQ = sum_by_document(
        np.stack([wasted_T, high_T], 1).astype(np.float64), document_T, int(document_T.max()) + 1
    )
    return bootstrap.ratio(counts_DQ[:, 0], counts_DQ[:, 1])
