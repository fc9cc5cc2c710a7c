"""Layer use, and agreement of routers with the oracle.

Shape letters: T tokens, L layers, P bins of positions, X draws of the bootstrap.
"""

from collections.abc import Iterator

import numpy as np

from duollm.analysis.results import AgreementRow, LayerUseRow, fields_of
from duollm.models.branch import Branch
from duollm.records.bootstrap import Floats, Integers, interval, intervals, sum_by_document
from duollm.records.keys import DRAWN_ORACLE, ORACLE, Key
from duollm.records.records import Draws
from duollm.records.tokens import Tokens
from duollm.records.use import AGREEING, TAKEN


def layer_use_rows(draws: Draws, tokens: Tokens, edges: Integers) -> Iterator[LayerUseRow]:
    """Yield the share of tokens whose layer is big, by depth and position, for the oracle and every router."""
    for quantity, key in draws.records.sums:
        if quantity == TAKEN and key.policy != DRAWN_ORACLE and key.context in (None, draws.records.context):
            share_XL = draws.mean(TAKEN, key)[:, :, Branch.BIG]
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
            chance_XL = (draws.mean(TAKEN, key) * draws.mean(TAKEN, oracle)).sum(2)
            yield AgreementRow(
                **fields_of(draws.records.domain, key),
                share=float(same_XL[0].mean()),
                share_if_independent=float(chance_XL[0].mean()),
                over_independent=interval((same_XL - chance_XL).mean(1)),
                share_by_layer=intervals(same_XL),
                share_if_independent_by_layer=chance_XL[0].tolist(),
            )
