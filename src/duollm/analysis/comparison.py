"""Rows of losses: every policy, the best of N draws, the gap that a router closes, and all policies at equal budgets.

Shape letters: D documents, N sizes of a draw, X draws of the bootstrap.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import exp
from typing import Any

import numpy as np

from duollm.analysis.claims.evidence import studied_router
from duollm.analysis.families import compared_budgets, fair_gain, gain_at_spent
from duollm.analysis.results import BestOfRow, ComparisonRow, GapRow, LossRow, SpendRow, fields_of
from duollm.models.branch import Branch
from duollm.records.best_of import BestOf
from duollm.records.bootstrap import Bootstrap, Estimate, Floats, Integers, interval, interval_if, intervals
from duollm.records.facts import Timing
from duollm.records.keys import (
    ALL_BIG,
    ALL_SMALL,
    AVERAGE,
    CEILING,
    EXACT,
    ORACLE,
    PATTERNS_DRAWN,
    STATIC,
    Key,
    ceiling_policy,
)
from duollm.records.patterns import PatternSums, best_of, first_half, whole_document_sums
from duollm.records.records import FLOPS, ROUTER_FLOPS, Draws
from duollm.records.tokens import Tokens

NEAR_BUDGET = 0.01
"""A router keeps its budget if the share of big that it spends is at most this far from what was asked."""


def nll_rows(draws: Draws) -> Iterator[LossRow]:
    """Yield the mean loss of every policy at every budget."""
    records = draws.records
    all_big_X = draws[Key(ALL_BIG, records.num_layers)]
    for key in records.policies:
        estimate = interval(draws[key])
        yield LossRow(
            **fields_of(records.domain, key),
            context=key.context,
            mean_big_layers=float(draws.spent(key)[0]),
            nll=estimate,
            perplexity=exp(estimate.value),
            over_all_big=interval(draws[key] - all_big_X),
            documents=len(records.tokens_D),
            tokens=int(records.tokens_D.sum()),
        )


def gap_rows(draws: Draws) -> Iterator[GapRow]:
    """Yield the share of the gap from static to the oracle that every router closes.

    The share is given twice: with both ends at the nominal k, and with both at the big layers that the router spent.
    """
    records = draws.records
    for key in records.policies:
        if key.kind is None or not records.offers_routes(key.big_layers):
            continue
        nominal_X = _closed(draws[key], *(draws.nll(policy, key.big_layers) for policy in (STATIC, ORACLE)))
        if nominal_X is None:
            continue
        spent_X, at_spent_X = draws.spent(key), None
        if 0 < spent_X[0] < records.num_layers and not records.skips:
            at_spent_X = _closed(draws[key], *(draws.nll_at(policy, spent_X) for policy in (STATIC, ORACLE)))
        yield GapRow(
            **fields_of(records.domain, key),
            mean_big_layers=float(spent_X[0]),
            closed=interval(nominal_X),
            closed_at_spent=interval_if(at_spent_X),
        )


def _closed(router_X: Floats, static_X: Floats | None, oracle_X: Floats | None) -> Floats | None:
    if static_X is None or oracle_X is None:
        return None
    return np.asarray((static_X - router_X) / (static_X - oracle_X))


def spend_rows(draws: Draws) -> Iterator[SpendRow]:
    """Yield, per kind and budget, the paired loss of spending exactly k on every token against k on average, nats."""
    routers = {(key.kind, key.big_layers, key.spend): key for key in draws.records.policies if key.kind}
    for (kind, k, spend), exact in routers.items():
        average = routers.get((kind, k, AVERAGE))
        if spend == EXACT and average and kind:
            cost = interval(draws[exact] - draws[average])
            yield SpendRow(draws.records.domain, kind, k, float(draws.spent(average)[0]), cost)


def best_of_pattern_rows(oracle: Tokens, patterns: PatternSums, bootstrap: Bootstrap, seed: int) -> Iterator[BestOfRow]:
    """Yield the best of N random patterns as a function of N, at the low, middle and high budget."""
    sizes = np.unique(np.geomspace(1, PATTERNS_DRAWN, 25).round().astype(np.int64)).tolist()
    all_big_D = oracle.by_document(oracle.policies[Key(ALL_BIG, oracle.space.num_layers)].nll_T)
    in_first_D = first_half(len(oracle.documents), seed)
    for k, nll_DR in patterns.by_budget(whole_document_sums(oracle, patterns)):
        if k in oracle.space.focus_budgets:
            totals_ND = best_of(nll_DR, sizes, in_first_D)
            estimates = _best_of(bootstrap, totals_ND, all_big_D, oracle.tokens_D)
            yield BestOfRow(oracle.domain, k, nll_DR.shape[1], sizes, *estimates)


def best_of_route_rows(
    oracle: Tokens, by_budget: Mapping[int, BestOf], patterns: PatternSums, bootstrap: Bootstrap
) -> Iterator[BestOfRow]:
    """Yield the expected best of N random routes per token as a function of N, at the same budgets."""
    all_big_D = patterns.uniform(Branch.BIG)
    for k, best in by_budget.items():
        if k in oracle.space.focus_budgets and all_big_D is not None:
            estimates = _best_of(bootstrap, best.nll_DN.T, all_big_D, patterns.counted_D)
            yield BestOfRow(oracle.domain, k, best.drawn[-1], best.drawn, *estimates)


def _best_of(
    bootstrap: Bootstrap, totals_ND: Floats, all_big_D: Floats, tokens_D: Integers
) -> tuple[list[Estimate], list[Estimate]]:
    """Return the losses, and how far they lie above all big."""
    nll = intervals(bootstrap.ratio(totals_ND.T, tokens_D))
    return nll, intervals(bootstrap.ratio((totals_ND - all_big_D).T, tokens_D))


def comparison_rows(draws: Draws, compared: Draws, timing: Timing | None) -> Iterator[ComparisonRow]:
    """Yield a row for every policy at every compared budget, and for all small and all big.

    Losses, and values relative to the oracle, come from `draws`. Gains and spending of policies that see no label come
    from `compared`, which may hold more text.
    """
    records, budgets = draws.records, compared_budgets(draws.records)
    gaps = {row.policy: row for row in gap_rows(draws)}
    for key in records.policies:
        if key.policy not in (ALL_SMALL, ALL_BIG) and key.big_layers not in budgets:
            continue
        on_more = key in compared
        text = compared if on_more else draws
        share = float(text.spent(key)[0]) / records.num_layers
        gap = gaps.get(key.policy)
        yield ComparisonRow(
            **fields_of(records.domain, key),
            context=key.context,
            nll=interval(draws[key]),
            compared_nll=float(compared[key][0]) if on_more else None,
            **_gains(text, key, _peeked(draws, key.big_layers)),
            gain_tokens=int(text.records.tokens_D.sum()),
            closed=gap.closed if gap else None,
            closed_at_spent=gap.closed_at_spent if gap else None,
            big_share=share,
            within_budget=abs(share - key.big_layers / records.num_layers) <= NEAR_BUDGET if key.kind else None,
            **_costs(draws, key, timing, share),
        )


def _peeked(draws: Draws, k: int) -> Floats | None:
    """Return what the oracle of the main context gains over static at k, draws [X]."""
    static_X, oracle_X = draws.nll(STATIC, k), draws.nll(ORACLE, k)
    return None if static_X is None or oracle_X is None else static_X - oracle_X


def _gains(draws: Draws, key: Key, peeked_X: Floats | None) -> dict[str, Any]:
    """Compare with static at k and at what was spent, and the gain with the oracle's and with the ceiling's.

    The ceiling is the one that spends alike. A share of a gain is given where there is one to share: where the interval
    of that gain is above 0. It is divided resample by resample, so its interval holds the uncertainty of both.
    """
    static_X, gain_X = draws.nll(STATIC, key.big_layers), fair_gain(draws, key)
    ceiling = Key(ceiling_policy(key.spend or AVERAGE), key.big_layers)
    ceiling_X = gain_at_spent(draws, ceiling) if ceiling in draws else None

    def share_of(whole_X: Floats | None) -> Floats | None:
        return gain_X / whole_X if gain_X is not None and whole_X is not None and interval(whole_X).low > 0 else None

    drawn = {
        "gain_over_static": None if static_X is None else static_X - draws[key],
        "gain_at_spent": gain_at_spent(draws, key),
        "of_oracle": share_of(peeked_X) if key.kind else None,
        "of_ceiling": share_of(ceiling_X),
    }
    return {name: interval_if(draws_X) for name, draws_X in drawn.items()}


def _costs(draws: Draws, key: Key, timing: Timing | None, big_share: float) -> dict[str, Any]:
    """Return FLOPs and time per token, both also relative to all big; None for what was not measured."""
    sums = draws.records.sums
    measured: dict[str, Any] = timing.row(key) if timing else {}
    predicted = key.policy.startswith(CEILING)  # its predictor is no part of any forward
    flops = float(draws.mean(FLOPS, key)[0]) if (FLOPS, key) in sums else None
    if timing and not (key.kind or draws.records.skips or predicted):
        flops = timing.flops_per_token(big_share)
    own = float(draws.mean(ROUTER_FLOPS, key)[0]) if (ROUTER_FLOPS, key) in sums else None
    relative = None if predicted else measured.get("relative_time")
    return {
        "flops_per_token": flops,
        "relative_flops": flops / timing.facts["all_big_flops_per_token"] if timing and flops else None,
        "router_flops_share": own / flops if own is not None and flops else None,
        "seconds_per_token": relative * timing.facts["all_big_seconds_per_token"] if timing and relative else None,
        "relative_time": relative,
        "relative_time_quartiles": measured.get("relative_time_quartiles") if relative else None,
        "router_time_share": measured.get("router_time_share"),
    }


def shown_routers(comparison: Sequence[ComparisonRow], domain: str, most: int = 3) -> list[str]:
    """Return routers of different kinds (see `PolicyRow.variant`) for figures that show few: the paper's, then by gain.

    The gain is the mean gain over static over the budgets, at what was spent if that is known.
    """
    gains: dict[tuple[str, str], list[float]] = {}
    for row in comparison:
        if row.kind and row.domain == domain:
            gain = row.fair_gain
            gains.setdefault((row.kind, row.variant), []).append(gain.value if gain else -np.inf)
    studied = studied_router(kind for kind, _ in gains)
    ranked = sorted(gains, key=lambda router: (router[1] != studied, -float(np.mean(gains[router]))))
    best: dict[str, str] = {}
    for kind, name in ranked:
        best.setdefault(kind, name)
    return list(best.values())[:most]
