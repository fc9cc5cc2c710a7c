"""Rows of losses: every policy, the best of N draws, and the gap from static to the oracle that a router closes.

Shape letters: D documents, N sizes of a draw, X draws of the bootstrap.
"""

from collections.abc import Iterator, Mapping
from math import exp

import numpy as np

from duollm.analysis.results import BestOfRow, GapRow, LossRow, SpendRow, fields_of
from duollm.models.branch import Branch
from duollm.records.best_of import BestOf
from duollm.records.bootstrap import Bootstrap, Estimate, Floats, Integers, interval, interval_if, intervals
from duollm.records.keys import ALL_BIG, AVERAGE, EXACT, ORACLE, PATTERNS_DRAWN, STATIC, Key
from duollm.records.patterns import PatternSums, best_of, first_half, whole_document_sums
from duollm.records.records import Draws
from duollm.records.tokens import Tokens


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
