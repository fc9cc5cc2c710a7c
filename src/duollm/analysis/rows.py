"""The rows of results.json; their fields are described in docs/formats.md.

Shape letters: D documents, N sizes of a draw, R routes, X draws of the bootstrap.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import exp
from typing import Any

import numpy as np

from duollm.analysis.difficulty import difficulty, hard_without_gain
from duollm.analysis.equal_budget import nll_at
from duollm.analysis.layer_use import LayerUse
from duollm.analysis.patterns import best_of
from duollm.analysis.policies import ALL_BIG, ORACLE, PATTERNS_DRAWN, STATIC, Scores, patterns_by_budget
from duollm.analysis.statistics import Bootstrap, Estimate, Floats, Integers, interval, intervals
from duollm.analysis.tables import OracleTable, PatternTable
from duollm.oracle.halves import first_half
from duollm.routes.space import focus_budgets

Row = dict[str, Any]


@dataclass(frozen=True)
class PolicyLayerUse:
    """The layer use of the oracle or of a trained router at one budget."""

    policy: str
    big_layers: int
    kind: str | None
    spend: str | None
    use: LayerUse


def nll_rows(scores: Scores, bootstrap: Bootstrap) -> Iterator[Row]:
    """Yield the mean loss of every policy at every budget."""
    tokens = int(scores.tokens_D.sum())
    draws = scores.nll_draws(bootstrap)
    all_big_X = next(nll_X for row, nll_X in zip(scores.rows, draws, strict=True) if row.policy == ALL_BIG)
    for row, nll_X in zip(scores.rows, draws, strict=True):
        estimate, over_big = interval(nll_X), interval(nll_X - all_big_X)
        yield {
            "domain": scores.domain,
            "policy": row.policy,
            "kind": row.kind,
            "spend": row.spend,
            "big_layers": row.big_layers,
            "mean_big_layers": float(row.big_D.sum() / tokens),
            "context": row.context,
            "nll": estimate.value,
            "low": estimate.low,
            "high": estimate.high,
            "perplexity": exp(estimate.value),
            "over_all_big": over_big.value,
            "over_all_big_low": over_big.low,
            "over_all_big_high": over_big.high,
            "documents": len(scores.tokens_D),
            "tokens": tokens,
        }


def gap_rows(scores: Scores, bootstrap: Bootstrap) -> Iterator[Row]:
    """Yield, for every router, the share of the gap from static to oracle that it closes.

    Once against both at the nominal k, once against both at the big layers that the router spent.
    """
    scores = scores.in_main_context()
    draws = scores.nll_draws(bootstrap)
    nll_X = {(row.policy, row.big_layers): draw_X for row, draw_X in zip(scores.rows, draws, strict=True)}
    for row, router_X, spent_X in zip(scores.rows, draws, scores.spent_draws(bootstrap), strict=True):
        k = row.big_layers
        # With no or all layers big there is one route only, so there is no gap to close.
        if row.kind is None or not 0 < k < scores.num_layers:
            continue
        nominal = _closed(router_X, nll_X.get((STATIC, k)), nll_X.get((ORACLE, k)))
        if nominal is None:
            continue
        at_spent = None
        if 0 < spent_X[0] < scores.num_layers and not scores.skips:
            at_spent = _closed(router_X, nll_at(nll_X, STATIC, spent_X), nll_at(nll_X, ORACLE, spent_X))
        yield {
            "domain": scores.domain,
            "policy": row.policy,
            "kind": row.kind,
            "spend": row.spend,
            "big_layers": k,
            "mean_big_layers": float(spent_X[0]),
            "closed": nominal.value,
            "low": nominal.low,
            "high": nominal.high,
            "closed_at_spent": at_spent and at_spent.value,
            "closed_at_spent_low": at_spent and at_spent.low,
            "closed_at_spent_high": at_spent and at_spent.high,
        }


def _closed(router_X: Floats, static_X: Floats | None, oracle_X: Floats | None) -> Estimate | None:
    if static_X is None or oracle_X is None:
        return None
    return interval((static_X - router_X) / (static_X - oracle_X))


def best_of_rows(oracle: OracleTable, patterns: PatternTable, bootstrap: Bootstrap, seed: int) -> Iterator[Row]:
    """Yield the best of N random patterns as a function of N, at the low, middle and high budget."""
    sizes = np.unique(np.geomspace(1, PATTERNS_DRAWN, 25).round().astype(np.int64)).tolist()
    all_big_D = oracle.by_document(oracle.nll_big_T)
    in_first_D = first_half(len(oracle.documents), seed)
    for k, nll_sum_DR in patterns_by_budget(oracle, patterns):
        if k not in focus_budgets(oracle.space.num_layers):
            continue
        totals_ND = best_of(nll_sum_DR, sizes, in_first_D)
        estimates = intervals(bootstrap.ratio(totals_ND.T, oracle.tokens_D))
        over_big = intervals(bootstrap.ratio((totals_ND - all_big_D).T, oracle.tokens_D))
        yield {
            "domain": oracle.domain,
            "big_layers": k,
            "patterns": nll_sum_DR.shape[1],
            "drawn": sizes,
            **_columns(estimates, "nll", "low", "high"),
            **_columns(over_big, "over_all_big", "over_all_big_low", "over_all_big_high"),
        }


def layer_use_rows(domain: str, uses: Sequence[PolicyLayerUse], edges: Integers, bootstrap: Bootstrap) -> Iterator[Row]:
    """Yield how often each layer is big, over depth and position, for the oracle and every router."""
    for measured in uses:
        by_layer = intervals(measured.use.by_layer(bootstrap))
        by_position = intervals(measured.use.by_position(bootstrap))
        yield {
            "domain": domain,
            "policy": measured.policy,
            "kind": measured.kind,
            "spend": measured.spend,
            "big_layers": measured.big_layers,
            **_columns(by_layer, "share_by_layer", "low", "high"),
            "position_edges": edges.tolist(),
            **_columns(by_position, "share_by_position", "low_by_position", "high_by_position"),
            "share_by_layer_and_position": measured.use.by_layer_and_position().tolist(),
        }


def difficulty_rows(oracle: OracleTable, bootstrap: Bootstrap) -> Iterator[Row]:
    """Yield, per budget, how loss and difficulty relate."""
    for k, nll_T in oracle.nll_oracle_T.items():
        if not 0 < k < oracle.space.num_layers:
            continue
        gain_T: Floats = difficulty(oracle.nll_small_T, nll_T)
        share = interval(hard_without_gain(oracle.nll_small_T, gain_T, oracle.document_T, bootstrap))
        yield {
            "domain": oracle.domain,
            "big_layers": k,
            "median_gain": float(np.median(gain_T)),
            "hard_without_gain": share.value,
            "low": share.low,
            "high": share.high,
        }


def _columns(estimates: Sequence[Estimate], value: str, low: str, high: str) -> dict[str, list[float]]:
    """Return estimates as three named lists."""
    return {
        value: [estimate.value for estimate in estimates],
        low: [estimate.low for estimate in estimates],
        high: [estimate.high for estimate in estimates],
    }
