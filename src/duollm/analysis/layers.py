"""Layer use over depth and over the window, and agreement of routers with the oracle.

Shape letters: T tokens, D documents, L layers, C branches, H = 2 halves of a window, M moments, P bins of positions, X
draws of the bootstrap.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from duollm.analysis.results import AgreementRow, LayerUseRow, fields_of
from duollm.models.branch import Branch
from duollm.records.bootstrap import Bootstrap, Floats, Integers, interval, intervals, sum_by_document
from duollm.records.keys import DRAWN_ORACLE, ORACLE, Key
from duollm.records.records import Draws
from duollm.records.tokens import Tokens
from duollm.records.use import AGREEING, HALVES, SKIPPED_AGAIN, TAKEN, correlation, within


def layer_use_rows(draws: Draws, tokens: Tokens, edges: Integers) -> Iterator[LayerUseRow]:
    """Yield the share of tokens whose layer is big, by depth and position, for the oracle and every router."""
    for quantity, key in draws.records.sums:
        if quantity == TAKEN and key.policy != DRAWN_ORACLE and key.context in (None, draws.records.context):
            share_XL = draws.mean(TAKEN, key)[:, :, Branch.BIG]
            share_XPL = share_by_position(tokens, key, edges, draws.bootstrap)
            yield LayerUseRow(
                **fields_of(draws.records.domain, key),
                share_by_layer=intervals(share_XL),
                position_edges=edges.tolist(),
                share_by_layer_and_position=[intervals(share_XP) for share_XP in share_XPL.T.swapaxes(1, 2)],
            )


def position_edges(position_T: Integers, most_bins: int = 8) -> Integers:
    """Return P + 1 edges that cut the observed positions into bins of (nearly) equal width.

    Bin p holds the positions edges[p] <= t < edges[p + 1]; the last edge is one past the last position.
    """
    first, last = int(position_T.min()), int(position_T.max())
    bins = min(most_bins, last - first + 1)
    return np.round(np.linspace(first, last + 1, bins + 1)).astype(np.int64)


def share_by_position(tokens: Tokens, key: Key, edges: Integers, bootstrap: Bootstrap) -> Floats:
    """Return the share of tokens whose layer is big, by draw, bin of positions and layer: [X, P, L]."""
    documents, bins = len(tokens.documents), len(edges) - 1
    cell_T = tokens.document_T * bins + np.searchsorted(edges, tokens.position_T, side="right") - 1
    is_big_TL = (tokens.policies[key].routes_TL == Branch.BIG).astype(np.float64)
    big_DPL = sum_by_document(is_big_TL, cell_T, documents * bins).reshape(documents, bins, -1)
    count_DP = np.bincount(cell_T, minlength=documents * bins).reshape(documents, bins)
    return bootstrap.ratio(big_DPL, count_DP)


def agreement_rows(draws: Draws) -> Iterator[AgreementRow]:
    """Yield the share of tokens on which a router and the oracle of its budget agree, per layer and overall.

    Beside it is the agreement by chance of two choosers with the same shares per layer. The context is the main one.
    """
    for quantity, key in draws.records.sums:
        if quantity == AGREEING:
            oracle = Key(ORACLE, key.big_layers, context=draws.records.context)
            same_XL = draws.mean(AGREEING, key)
            chance_XL = (draws.mean(TAKEN, key) * draws.mean(TAKEN, oracle)).sum(2)
            yield AgreementRow(
                **fields_of(draws.records.domain, key),
                share=float(same_XL[0].mean()),
                share_if_independent=float(chance_XL[0].mean()),
                over_independent=interval((same_XL - chance_XL).mean(1)),
                share_by_layer=intervals(same_XL),
                share_if_independent_by_layer=chance_XL[0].tolist(),
            )


@dataclass(frozen=True)
class RouterUse:
    """How a router uses its branches at a budget.

    Attributes:
        share_XLC: share of each branch, by layer.
        early_X: share of big in the first half of the window minus that in the second.
        documents_X: share of documents whose first half uses big more than the second; ties count half.
        again_X: correlation over (window, layer) of the share of skip in the first and in the second half.
        again_within_X: the same after each layer's own means are taken out.
    """

    share_XLC: Floats
    early_X: Floats
    documents_X: Floats
    again_X: Floats
    again_within_X: Floats


def router_use(draws: Draws, key: Key) -> RouterUse:
    """Return how a router uses its branches, by draw."""
    ratio, halves_DHLC = draws.bootstrap.ratio, draws.records.sums[HALVES, key]
    by_layer_DLC, by_half_DHC = halves_DHLC.sum(1), halves_DHLC.sum(2)
    all_DL, all_DH = by_layer_DLC.sum(-1), by_half_DHC.sum(-1)
    share_XLC = np.stack([ratio(by_layer_DLC[..., branch], all_DL) for branch in Branch], axis=-1)
    early_X = ratio(by_half_DHC[..., Branch.BIG], all_DH) @ [1.0, -1.0]
    has_both_D = (all_DH > 0).all(-1)
    share_DH = by_half_DHC[..., Branch.BIG] / np.maximum(all_DH, 1)
    more_D = np.where(has_both_D, (np.sign(share_DH[:, 0] - share_DH[:, 1]) + 1) / 2, 0.0)
    moments_XLM = np.tensordot(draws.bootstrap.weights_XD, draws.records.sums[SKIPPED_AGAIN, key], axes=1)
    return RouterUse(
        share_XLC,
        early_X,
        ratio(more_D, has_both_D.astype(np.float64)),
        correlation(moments_XLM.sum(1)),
        correlation(within(moments_XLM)),
    )
