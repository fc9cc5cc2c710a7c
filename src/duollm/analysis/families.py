"""Families of comparisons: the area between a router's curve and static's, who beats static, and who may be the best.

About ten routers at five budgets are fifty comparisons, of which some come out well by chance (docs/claims.md). The
largest of many is far out in the tails, where percentiles are off if gains are skewed. So each resample is divided by
its own standard error here (bootstrap t), which keeps the level (tests/analysis/test_families.py).

Shape letters: X draws of the bootstrap (the data first), S resamples, D documents, C comparisons, R routers.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from duollm.analysis.results import FamilyRow
from duollm.records.bootstrap import Floats, Integers, interval, interval_if
from duollm.records.keys import ORACLE, STATIC, Key
from duollm.records.records import BIG, NLL, Draws, Records, neighbours

Gains = dict[str, dict[int, Floats]]
"""By the `variant` of a router and by budget."""


def compared_budgets(records: Records) -> list[int]:
    """Return the budgets of the routers, or all searched ones if there is no router; not the fewest and the most."""
    between = [key for key in records.policies if records.offers_routes(key.big_layers)]
    routers = {key.big_layers for key in between if key.kind}
    return sorted(routers or {key.big_layers for key in between if key.policy == ORACLE})


def gain_at_spent(draws: Draws, key: Key) -> Floats | None:
    """Return the gain over static at what was spent, draws [X]; None if static is not known there, or may skip."""
    static_X = None if draws.records.skips else draws.nll_at(STATIC, draws.spent(key))
    return None if static_X is None else static_X - draws[key]


def fair_gain(draws: Draws, key: Key) -> Floats | None:
    """Return the gain over static at what was spent, draws [X]; at k if static is not known there; None if neither."""
    at_spent_X, static_X = gain_at_spent(draws, key), draws.nll(STATIC, key.big_layers)
    return static_X - draws[key] if at_spent_X is None and static_X is not None else at_spent_X


def gain_totals(draws: Draws, key: Key) -> Floats | None:
    """Return the sums over documents [D] of which `fair_gain` is the mean per token, to first order in a resample.

    What a router spent, and static's slope there, are taken from the data. The sum over all documents is exact.
    """
    sums, tokens_D = draws.records.sums, draws.records.tokens_D
    if fair_gain(draws, key) is None:
        return None
    if gain_at_spent(draws, key) is None:
        return sums[NLL, Key(STATIC, key.big_layers)] - sums[NLL, key]
    spent = draws.spent(key)[0]
    low, high = neighbours(spent, draws.records.possible)
    below, above = (sums[NLL, Key(STATIC, k)] for k in (low, high))
    step_D = (above - below) / max(1, high - low)
    slope = step_D.sum() / tokens_D.sum()
    static_D = below + (spent - low) * step_D + (sums[BIG, key] - spent * tokens_D) * slope
    return np.asarray(static_D - sums[NLL, key])


def router_gains(draws: Draws, of: Callable[[Draws, Key], Floats | None] = fair_gain) -> Gains:
    """Return the gains of every router at the compared budgets: draws [X], or what else `of` returns."""
    budgets = compared_budgets(draws.records)
    found: Gains = {}
    for key in sorted(draws.records.policies, key=lambda key: key.big_layers):
        gain = of(draws, key) if key.kind and key.big_layers in budgets else None
        if gain is not None:
            found.setdefault(key.variant, {})[key.big_layers] = gain
    return dict(sorted(found.items()))


def areas(draws: Draws, of: Callable[[Draws, Key], Floats | None] = fair_gain) -> dict[str, Floats]:
    """Return the area of every router by its `variant`: draws [X], nats per token, or what else `of` returns.

    The area is the gain over static at what was spent, averaged over the budgets by the trapezoid rule. A router that
    was not measured at all budgets has none.
    """
    budgets = compared_budgets(draws.records)
    return {router: _mean(gains) for router, gains in router_gains(draws, of).items() if list(gains) == budgets}


def _mean(gains: dict[int, Floats]) -> Floats:
    budgets, values = list(gains), list(gains.values())
    if len(budgets) == 1:
        return values[0]
    return np.asarray(np.trapezoid(values, budgets, axis=0) / (budgets[-1] - budgets[0]))


def family_rows(draws: Draws, samples: int, seed: int) -> Iterator[FamilyRow]:
    """Yield a row per router with its gains over static at all budgets, each judged among those of all routers."""
    gains, totals = router_gains(draws), router_gains(draws, gain_totals)
    if not gains:
        return
    tokens_D, counts_XD = draws.records.tokens_D, whole_resamples(draws.records.strata, samples, seed)
    compared = [(router, k) for router, by_budget in totals.items() for k in by_budget]
    gain_p = step_down(*studentised(_columns(totals[router][k] for router, k in compared), tokens_D, counts_XD))
    area_X, area_D = areas(draws), areas(draws, gain_totals)
    best_p = confidence_set(-_columns(area_D.values()), tokens_D, counts_XD) if area_D else ()
    by_comparison, by_router = (dict(zip(*pair, strict=True)) for pair in ((compared, gain_p), (area_D, best_p)))
    for router, gain_X in gains.items():
        area = area_X.get(router)
        yield FamilyRow(
            draws.records.domain,
            router,
            big_layers=list(gain_X),
            gain=[interval(one) for one in gain_X.values()],
            gain_p=[float(by_comparison[router, k]) for k in gain_X],
            area=interval_if(area),
            area_p=None if area is None else two_sided(area),
            best_p=None if area is None else float(by_router[router]),
        )


def whole_resamples(strata: Sequence[int], samples: int, seed: int) -> Integers:
    """Return how often each document occurs, [X, D]: once in the data, then in resamples as large as the data."""
    generator = np.random.default_rng(seed)
    counts = [generator.multinomial(size, np.full(size, 1 / size), samples) for size in strata]
    return np.concatenate([np.ones((1, sum(strata)), dtype=np.int64), np.concatenate(counts, axis=1)])


def studentised(totals_DC: Floats, tokens_D: Integers, counts_XD: Integers) -> tuple[Floats, Floats]:
    """Return the mean per token of sums over documents in standard errors [C], and resamples [S, C] around the data.

    The standard error is the linearised one of a ratio. What never varies is 0.
    """
    drawn_X, tokens_D1 = counts_XD @ tokens_D, tokens_D[:, None]
    mean_XC = counts_XD @ totals_DC / drawn_X[:, None]
    squares_XC = counts_XD @ totals_DC**2 - 2 * mean_XC * (counts_XD @ (totals_DC * tokens_D1))
    squares_XC += mean_XC**2 * (counts_XD @ tokens_D1**2)
    error_XC = np.sqrt(np.maximum(squares_XC, 0)) / drawn_X[:, None]
    error_XC[:, error_XC[0] < 1e-12] = np.inf  # rounding
    with np.errstate(divide="ignore", invalid="ignore"):
        null_SC = (mean_XC[1:] - mean_XC[0]) / error_XC[1:]
    return mean_XC[0] / error_XC[0], np.where(np.isnan(null_SC), 0, null_SC)


def step_down(t_C: Floats, null_SC: Floats) -> Floats:
    """Return p-values [C] of means above 0, adjusted: the chance to name any that is not above 0 stays below them.

    Romano and Wolf's step-down of the largest (Econometrica 73, 2005). The comparisons may depend on each other.
    """
    adjusted_C, least = np.empty(len(t_C)), 0.0
    order = np.argsort(-t_C, kind="stable")
    for place, comparison in enumerate(order):
        least = max(least, _p_value(t_C[comparison], null_SC[:, order[place:]]))
        adjusted_C[comparison] = least
    return adjusted_C


def confidence_set(loss_DR: Floats, tokens_D: Integers, counts_XD: Integers) -> NDArray[np.float64]:
    """Return p-values [R]; the routers above 0.05 are a set that holds the one of the lowest loss with 95 %.

    The model confidence set with T_max (Hansen, Lunde and Nason, Econometrica 79, 2011): as long as the losses are not
    all equal, drop the router that lies farthest above the mean.
    """
    p_R, most = np.ones(loss_DR.shape[1]), 0.0
    left = list(range(loss_DR.shape[1]))
    while len(left) > 1:
        above_DC = loss_DR[:, left] - loss_DR[:, left].mean(1, keepdims=True)
        t_C, null_SC = studentised(above_DC, tokens_D, counts_XD)
        worst = int(t_C.argmax())
        most = max(most, _p_value(t_C[worst], null_SC))
        p_R[left.pop(worst)] = most
    return p_R


def two_sided(draws_X: Floats) -> float:
    """Return the p-value of a difference from 0: one minus the level at which the percentile interval reaches 0."""
    tail = min((draws_X[1:] <= 0).sum(), (draws_X[1:] >= 0).sum())
    return min(1.0, 2 * float(1 + tail) / len(draws_X))


def _p_value(t: float, null_SC: Floats) -> float:
    return float(1 + (null_SC.max(1) >= t).sum()) / (1 + len(null_SC))


def _columns(values: Iterable[Floats]) -> Floats:
    return np.stack(list(values), axis=1)
