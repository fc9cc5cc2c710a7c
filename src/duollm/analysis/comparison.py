"""Compares all policies at equal budgets: loss, gain over static, share of the reachable gain, and cost."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from duollm.analysis.areas import compared_budgets, fair_gain, gain_at_spent
from duollm.analysis.claims.evidence import studied_router
from duollm.analysis.losses import gap_rows
from duollm.analysis.results import ComparisonRow, fields_of
from duollm.records.bootstrap import Floats, interval, interval_if
from duollm.records.facts import Timing
from duollm.records.keys import ALL_BIG, ALL_SMALL, AVERAGE, CEILING, ORACLE, STATIC, Key, ceiling_policy
from duollm.records.records import FLOPS, ROUTER_FLOPS, Draws

NEAR_BUDGET = 0.01
"""A router keeps its budget if the share of big that it spends is at most this far from what was asked."""


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
