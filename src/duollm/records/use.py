"""How policies use branches: sums of a document by layer, and over the two halves of its windows.

Shape letters: T tokens, L layers, C branches, D documents, W windows, H = 2 halves of a window. M stands for the
moments of two numbers: how many pairs, their sums, sums of squares, and the sum of products.
"""

from typing import Any

import numpy as np

from duollm.models.branch import Branch
from duollm.records.bootstrap import Floats, Integers, sum_by_document
from duollm.records.keys import DRAWN_ORACLE, ORACLE, Key
from duollm.records.tokens import PolicyTokens, Tokens

Sums = dict[tuple[str, Key], Floats]
"""Sums over the tokens of each document, [D, Q...], by quantity and policy."""
TAKEN, AGREEING = "branches", "agreeing"
"""Tokens on each branch [D, L, C], and tokens on the oracle's branch [D, L]."""
HALVES, SKIPPED_AGAIN = "halves", "skipped again"
"""Tokens by half of their window, layer and branch [D, H, L, C]; and, over the windows, the moments [D, L, M] of the
share of skip in the first half and in the second."""


def use_sums(tokens: Tokens) -> Sums:
    """Sum the use of branches of routers and of every search, and where routers and the main oracle agree."""
    sums: Sums = {}
    routers = tokens.routers()
    searches = {
        key: one
        for key, one in tokens.policies.items()
        if key.policy in (ORACLE, DRAWN_ORACLE) and one.route_T is not None
    }
    for key, one in (searches | routers).items():
        sums[TAKEN, key] = tokens.by_document(_by_branch(one.routes_TL))
    searched = tokens.searched()
    for key, one in routers.items():
        sums |= window_sums(tokens, key, one)
        if key.big_layers in searched:
            same_TL = one.routes_TL == tokens.oracle(key.big_layers).routes_TL
            sums[AGREEING, key] = tokens.by_document(same_TL.astype(np.float64))
    return sums


def _by_branch(routes_TL: Integers) -> Floats:
    """Return 1 for the branch that is taken, [T, L, C]."""
    return (routes_TL[:, :, None] == np.array(list(Branch))).astype(np.float64)


def window_sums(tokens: Tokens, key: Key, one: PolicyTokens) -> Sums:
    """Sum the use of branches by half of the window. A window that ends in its first half has no moments."""
    half_T = halves(tokens.position_T)
    document_T, window_T = tokens.document_T, tokens.window_T
    starts_T = np.concatenate([[True], (np.diff(document_T) != 0) | (np.diff(window_T) != 0)])
    taken_TLC = _by_branch(one.routes_TL)
    cell_T = 2 * (np.cumsum(starts_T) - 1) + half_T
    windows = int(starts_T.sum())
    counts_WHLC = sum_by_document(taken_TLC, cell_T, 2 * windows).reshape(windows, 2, *taken_TLC.shape[1:])
    document_W = document_T[starts_T]
    with np.errstate(invalid="ignore"):
        skipped_WHL = counts_WHLC[..., Branch.SKIP] / counts_WHLC.sum(-1)
    moments_WLM = moments(skipped_WHL[:, 0], skipped_WHL[:, 1])
    documents = len(tokens.documents)
    return {
        (HALVES, key): sum_by_document(counts_WHLC, document_W, documents),
        (SKIPPED_AGAIN, key): sum_by_document(moments_WLM, document_W, documents),
    }


def halves(position_T: Integers) -> Integers:
    """Return for each predicted token whether the token that predicts it is in the second half of its window."""
    return np.asarray(2 * position_T > position_T.max() + 1, dtype=np.int64)


def moments(first_Q: Floats, second_Q: Floats) -> Floats:
    """Return the moments [Q, M] of each pair; zeros where one of the two is NaN."""
    parts: list[Any] = [np.ones_like(first_Q), first_Q, second_Q, first_Q**2, second_Q**2, first_Q * second_Q]
    return np.stack([np.where(np.isfinite(first_Q * second_Q), part, 0.0) for part in parts], axis=-1)


def correlation(moments_QM: Floats) -> Floats:
    """Return the correlation [Q] of pairs from sums of their moments; NaN if one of the two is constant."""
    count, first, second, first_2, second_2, product = np.moveaxis(moments_QM, -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = (first_2 - first**2 / count) * (second_2 - second**2 / count)
        return np.asarray((product - first * second / count) / np.sqrt(np.where(spread > 1e-12, spread, np.nan)))


def within(moments_QLM: Floats) -> Floats:
    """Return the moments [Q, M] over all layers of what is left when each layer's own means are taken out."""
    count, first, second, first_2, second_2, product = np.moveaxis(moments_QLM, -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        left = [first_2 - first**2 / count, second_2 - second**2 / count, product - first * second / count]
    zeros = np.zeros_like(count)
    return np.stack([each.sum(-1) for each in (count, zeros, zeros, *left)], axis=-1)
