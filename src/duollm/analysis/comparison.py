"""All policies at equal budgets: loss, gain over static, share of what is reachable, and what they really cost.

Shape letters: X draws of the bootstrap.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from duollm.analysis.ceiling import ceiling_policy
from duollm.analysis.claims import studied_router
from duollm.analysis.equal_budget import nll_at
from duollm.analysis.policies import ALL_BIG, ALL_SMALL, CEILING, EXACT, ORACLE, STATIC, Score, Scores, variant
from duollm.analysis.rows import Row, gap_rows
from duollm.analysis.statistics import Bootstrap, Estimate, Floats, interval
from duollm.analysis.timing import Timing

NEAR_BUDGET = 0.01
"""A router keeps its budget if the share of big that it spends is at most this far from what was asked."""


def compared_budgets(scores: Scores) -> list[int]:
    """Return the budgets of the routers, or all that were searched if there is none; without none and all big."""
    between = [row for row in scores.rows if 0 < row.big_layers < scores.num_layers]
    routers = {row.big_layers for row in between if row.kind}
    return sorted(routers or {row.big_layers for row in between if row.policy == ORACLE})


def comparison_rows(
    scores: Scores, bootstrap: Bootstrap, compared: Scores, of_compared: Bootstrap, timing: Timing | None
) -> Iterator[Row]:
    """Yield every policy at every budget compared, and both ends; fields are described in docs/formats.md.

    Losses and what relates to the oracle are of `scores`; gains and spending of policies that see no label are of
    `compared`, which may hold more text.
    """
    draws = zip(scores.rows, scores.nll_draws(bootstrap), scores.spent_draws(bootstrap), strict=True)
    on_oracles, on_more = _measured(scores, bootstrap), _measured(compared, of_compared)
    gaps = {row["policy"]: row for row in gap_rows(scores, bootstrap)}
    budgets = compared_budgets(scores)
    for row, nll_X, spent_X in draws:
        if row.policy not in (ALL_SMALL, ALL_BIG) and row.big_layers not in budgets:
            continue
        text, measured, own_X = scores, on_oracles, nll_X
        if (row.policy, row.big_layers) in on_more and row.context in (None, scores.context):
            text, measured = compared, on_more
            own_X, spent_X = on_more[row.policy, row.big_layers]
        share = float(spent_X[0]) / scores.num_layers
        yield {
            "domain": scores.domain,
            "big_layers": row.big_layers,
            "policy": row.policy,
            "kind": row.kind,
            "spend": row.spend,
            "context": row.context,
            **_named("nll", interval(nll_X)),
            "compared_nll": float(own_X[0]) if text is compared else None,
            **_gains(measured, row, own_X, None if scores.skips else spent_X),
            "gain_tokens": int(text.tokens_D.sum()),
            **_closed(gaps.get(row.policy)),
            "big_share": share,
            "within_budget": abs(share - row.big_layers / scores.num_layers) <= NEAR_BUDGET if row.kind else None,
            **_costs(row, scores, timing, share),
        }


def _measured(scores: Scores, bootstrap: Bootstrap) -> dict[tuple[str, int], tuple[Floats, Floats]]:
    """Return the draws of loss and spending of every policy, of oracles in the main context, by policy and k."""
    draws = zip(scores.rows, scores.nll_draws(bootstrap), scores.spent_draws(bootstrap), strict=True)
    return {
        (row.policy, row.big_layers): (nll_X, spent_X)
        for row, nll_X, spent_X in draws
        if row.context in (None, scores.context)
    }


def spend_rows(scores: Scores, bootstrap: Bootstrap) -> Iterator[Row]:
    """Yield, per kind and budget, what spending exactly k on every token costs against k on average, nats (paired)."""
    draws = zip(scores.rows, scores.nll_draws(bootstrap), scores.spent_draws(bootstrap), strict=True)
    found = {(row.kind, row.big_layers, row.spend): (nll_X, spent_X) for row, nll_X, spent_X in draws if row.kind}
    for (kind, k, spend), (exact_X, _) in found.items():
        if spend != EXACT or (kind, k, "average") not in found:
            continue
        average_X, spent_X = found[kind, k, "average"]
        yield {
            "domain": scores.domain,
            "kind": kind,
            "big_layers": k,
            "average_mean_big_layers": float(spent_X[0]),
            **_named("exact_minus_average", interval(exact_X - average_X)),
        }


def shown_routers(comparison: Sequence[Row], domain: str, most: int = 3) -> list[str]:
    """Return routers of different kinds (see `variant`) for figures that show few: the paper's, then by gain.

    The gain is that over static, the mean over the budgets, at what was spent where that is known.
    """
    gains: dict[tuple[str, str], list[float]] = {}
    for row in comparison:
        if row["kind"] and row["domain"] == domain:
            gain = row["gain_over_static"] if row["gain_at_spent"] is None else row["gain_at_spent"]
            gains.setdefault((row["kind"], variant(row)), []).append(-np.inf if gain is None else gain)
    studied = studied_router(kind for kind, _ in gains)
    ranked = sorted(gains, key=lambda router: (router[1] != studied, -float(np.mean(gains[router]))))
    best: dict[str, str] = {}
    for kind, name in ranked:
        best.setdefault(kind, name)
    return list(best.values())[:most]


def _gains(
    measured: Mapping[tuple[str, int], tuple[Floats, Floats]], row: Score, own_X: Floats, spent_X: Floats | None
) -> Row:
    """Compare with static at k and at what was spent, and the gain with that of the ceiling which spends alike.

    A share of the ceiling's gain is given where the ceiling shows one: where the interval of its gain is above 0.
    """
    nll_X = {key: draws_X for key, (draws_X, _) in measured.items()}

    def fair_gain(own_X: Floats, spent_X: Floats | None) -> Floats | None:
        static_X = None if spent_X is None else nll_at(nll_X, STATIC, spent_X)
        return None if static_X is None else np.asarray(static_X - own_X)

    static_X = nll_X.get((STATIC, row.big_layers))
    drawn = {
        "gain_over_static": None if static_X is None else static_X - own_X,
        "gain_at_spent": fair_gain(own_X, spent_X),
        "of_ceiling": None,
    }
    ceiling = measured.get((ceiling_policy(row.spend or "average"), row.big_layers))
    ceiling_gain_X = fair_gain(*ceiling) if ceiling and spent_X is not None else None
    gain_X = drawn["gain_over_static"] if drawn["gain_at_spent"] is None else drawn["gain_at_spent"]
    if gain_X is not None and ceiling_gain_X is not None and interval(ceiling_gain_X).low > 0:
        drawn["of_ceiling"] = gain_X / ceiling_gain_X
    fields: Row = {}
    for name, draws_X in drawn.items():
        fields |= _named(name, None if draws_X is None else interval(draws_X))
    return fields


def _closed(gap: Row | None) -> Row:
    """Take over the gap closed between static and oracle, at k and at what was spent; None for what is no router."""
    sources = {"closed": "closed", "closed_low": "low", "closed_high": "high"}
    sources |= {f"closed_at_spent{end}": f"closed_at_spent{end}" for end in ("", "_low", "_high")}
    return {name: gap and gap[source] for name, source in sources.items()}


def _costs(row: Score, scores: Scores, timing: Timing | None, big_share: float) -> Row:
    """Return FLOPs and time per token, both also relative to all big; None for what was not measured."""
    tokens = float(scores.tokens_D.sum())
    measured: dict[str, Any] = timing.row(row) if timing else {}
    predicted = row.policy.startswith(CEILING)  # its predictor is no part of any forward
    flops = None if row.flops_D is None else float(row.flops_D.sum()) / tokens
    if timing and not (row.kind or scores.skips or predicted):
        flops = timing.flops_per_token(big_share)
    own = None if row.router_flops_D is None else float(row.router_flops_D.sum()) / tokens
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


def _named(name: str, estimate: Estimate | None) -> Row:
    """Return an estimate as three fields; the interval of "nll" is called low and high, as elsewhere."""
    prefix = "" if name == "nll" else f"{name}_"
    return {
        name: estimate and estimate.value,
        f"{prefix}low": estimate and estimate.low,
        f"{prefix}high": estimate and estimate.high,
    }
