"""The gain over static at what a router spent, and one number per router: the area between its curve and static's.

Shape letters: X draws of the bootstrap, D documents.
"""

from collections.abc import Callable

import numpy as np

from duollm.records.bootstrap import Floats
from duollm.records.keys import ORACLE, STATIC, Key
from duollm.records.records import BIG, NLL, Draws, Records, neighbours


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


Gains = dict[str, dict[int, Floats]]
"""By the `variant` of a router and by budget."""


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
