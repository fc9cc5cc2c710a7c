import numpy as np
import pytest

from duollm.analysis.analyse import analyse
from duollm.analysis.comparison import comparison_rows, shown_routers, spend_rows
from duollm.records.keys import CEILING, Key
from duollm.records.records import Draws, Records
from picking import pick
from synthetic_run import Plan, write_run


@pytest.fixture
def rows(compared):
    return compared[2].comparison


def _width(estimate):
    return estimate.high - estimate.low


def test_every_policy_stands_at_every_budget_of_the_routers(rows):
    at_k3 = {(row.policy, row.context) for row in rows if (row.domain, row.big_layers) == ("pooled", 3)}
    assert {("static", None), ("oracle", "shared"), ("linear-k3", None), ("gains_k3", None)} <= at_k3
    assert ("gains_k3_exact", None) in at_k3
    contexts = {row.context for row in rows if (row.policy, row.big_layers) == ("oracle", 2)}
    assert contexts == {"shared", "committed"}
    assert {row.big_layers for row in rows if row.policy == "oracle"} == {1, 2, 3, 4, 5}
    assert {row.big_layers for row in rows if row.policy in ("all-small", "all-big")} == {0, 6}


def test_losses_and_gains_equal_their_definitions(compared, rows):
    truth = compared[1]["prose"]
    nll = {
        name: pick(rows, domain="prose", big_layers=3, policy=name, context=context).nll.value
        for name, context in (("static", None), ("oracle", "shared"), ("gains_k3_exact", None))
    }
    route_T = truth.good_route_T[3, "exact"]
    assert nll["gains_k3_exact"] == pytest.approx(truth.nll_TR[np.arange(len(route_T)), route_T].mean())
    row = pick(rows, domain="prose", policy="gains_k3_exact")
    gain = nll["static"] - nll["gains_k3_exact"]
    assert row.gain_over_static == row.gain_at_spent
    assert row.gain_over_static.value == pytest.approx(gain)
    assert row.gain_over_static.low < gain < row.gain_over_static.high
    assert row.closed.value == pytest.approx(gain / (nll["static"] - nll["oracle"]))
    assert row.of_ceiling is None


def test_gains_are_paired(rows):
    """Documents differ by tenths of a nat; the difference of two policies on them is known far better."""
    row = pick(rows, domain="pooled", policy="gains_k3_exact")
    assert _width(row.gain_over_static) < 0.6 * _width(row.nll)


def test_costs_are_those_of_the_files(rows):
    row = pick(rows, domain="prose", policy="gains_k3")
    line = 0.6 + 0.4 * 3 / 6
    assert row.flops_per_token == pytest.approx(1310)
    assert row.relative_flops == pytest.approx(1310 / 1600)
    assert row.router_flops_share == pytest.approx(10 / 1310)
    assert row.relative_time == pytest.approx(1.1 * line)
    assert row.seconds_per_token == pytest.approx(1.1 * line * 2e-4)
    assert pick(rows, domain="prose", policy="static", big_layers=3).relative_time == pytest.approx(line)
    oracle = pick(rows, domain="prose", policy="oracle", context="shared", big_layers=3)
    assert oracle.relative_time == pytest.approx(1.05 * line)
    assert oracle.flops_per_token == pytest.approx(1300)
    assert pick(rows, domain="prose", policy="all-big").relative_time == 1
    assert pick(rows, domain="prose", policy="linear-k3").flops_per_token is None


def test_a_budget_is_kept_within_a_percentage_point(tmp_path):
    write_run(tmp_path, Plan(overspent_share=0.25, tokens_per_document=40, documents=4, router_budgets=(2, 3)))
    rows = analyse(tmp_path, 50).comparison
    row = pick(rows, domain="prose", policy="linear-k3")
    assert row.big_share > 3.2 / 6
    assert row.within_budget is False
    assert row.gain_at_spent.value < row.gain_over_static.value
    assert pick(rows, domain="prose", policy="static", big_layers=3).within_budget is None
    assert all(row.flops_per_token is row.relative_time is None for row in rows)


STATIC, ORACLE = Key("static", 3), Key("oracle", 3, context="shared")
ROUTER, EXACT = Key("gains_k3", 3, "gains", "average"), Key("gains_k3_exact", 3, "gains", "exact")


def _draws(losses, spent=None, shifts=None, tokens=(10, 10, 10), skips=False):
    """Policies on three documents, by mean loss; a shift makes the first document harder than the last."""
    tokens_D, sums = np.array(tokens), {}
    for key, nll in losses.items():
        shift = (shifts or {}).get(key, 0)
        sums["nll", key] = nll * tokens_D + np.array([0.1, 0.0, -0.1]) * shift
        sums["big", key] = (spent or {}).get(key, float(key.big_layers)) * tokens_D
    return Draws(Records("text", "shared", 6, (3,), tokens_D, sums, skips), 50, 0)


def _rows(draws, compared=None):
    return list(comparison_rows(draws, compared or draws, None))


def test_gains_and_spending_are_of_the_larger_text_and_what_relates_to_the_oracle_of_its_own():
    on_oracles = _draws({STATIC: 4.0, Key(CEILING, 3): 3.8, ORACLE: 3.0, ROUTER: 3.85}, shifts={ROUTER: 1})
    more = {STATIC: 3.9, Key(CEILING, 3): 3.5, ROUTER: 3.8}
    rows = _rows(on_oracles, _draws(more, spent={ROUTER: 2.5}, shifts={ROUTER: 1}, tokens=(20, 20, 20)))
    router, oracle = pick(rows, policy="gains_k3"), pick(rows, policy="oracle")
    assert (router.nll.value, router.compared_nll) == pytest.approx((3.85, 3.8))
    assert router.closed.value == pytest.approx(0.15)
    assert router.gain_over_static.value == pytest.approx(0.1)
    assert router.gain_at_spent is None, "static was not measured at 2"
    assert router.of_ceiling.value == pytest.approx(0.1 / 0.4)
    assert (router.gain_tokens, router.big_share, router.within_budget) == (60, pytest.approx(2.5 / 6), False)
    assert oracle.gain_over_static.value == pytest.approx(1.0)
    assert (oracle.gain_tokens, oracle.compared_nll) == (30, None)


def test_the_share_of_the_ceiling_that_a_router_reaches():
    rows = _rows(_draws({STATIC: 4.0, Key(CEILING, 3): 3.8, ORACLE: 3.0, ROUTER: 3.85}, shifts={ROUTER: 1}))
    router = pick(rows, policy="gains_k3")
    assert router.of_ceiling.value == pytest.approx(0.75)
    assert router.of_ceiling.low < 0.75 < router.of_ceiling.high
    assert pick(rows, policy="oracle").of_ceiling.value == pytest.approx(5)
    assert router.closed.value == pytest.approx(0.15)


def test_the_share_of_the_oracles_gain_is_as_uncertain_as_both():
    """The router's gain is the same in every document, and the oracle's is not."""
    draws = _draws({STATIC: 4.0, ORACLE: 3.0, ROUTER: 3.9}, shifts={ORACLE: 1})
    router, oracle = pick(_rows(draws), policy="gains_k3"), pick(_rows(draws), policy="oracle")
    assert router.gain_at_spent.low == pytest.approx(router.gain_at_spent.high)
    ends = [0.1 / end for end in (oracle.gain_over_static.high, oracle.gain_over_static.low)]
    assert (router.of_oracle.value, router.of_oracle.low, router.of_oracle.high) == pytest.approx((0.1, *ends))
    assert oracle.of_oracle is None


def test_no_share_of_a_ceiling_that_shows_no_gain():
    """A share of something near 0 is noise, however its sign falls out."""
    ceiling = Key(CEILING, 3)
    router = pick(_rows(_draws({STATIC: 4.0, ceiling: 3.99, ROUTER: 3.85}, shifts={ceiling: 20})), policy="gains_k3")
    assert router.gain_at_spent.value == pytest.approx(0.15)
    assert router.of_ceiling is None


def test_where_other_routes_may_skip_there_is_no_comparison_at_what_was_spent():
    router = pick(_rows(_draws({STATIC: 4.0, Key(CEILING, 3): 3.8, ROUTER: 3.85}, skips=True)), policy="gains_k3")
    assert router.gain_over_static.value == pytest.approx(0.15)
    assert router.gain_at_spent is router.of_ceiling is None


def test_the_worth_of_spending_on_average_is_paired():
    alone = Key("linear_k3_exact", 3, "linear", "exact")
    losses = {ROUTER: 3.85, EXACT: 3.95, alone: 3.95}
    [row] = spend_rows(_draws(losses, spent={ROUTER: 3.1}, shifts=dict.fromkeys(losses, 5)))
    assert (row.kind, row.big_layers) == ("gains", 3)
    assert row.exact_minus_average.value == pytest.approx(0.1)
    assert row.exact_minus_average.low == pytest.approx(row.exact_minus_average.high)
    assert row.average_mean_big_layers == pytest.approx(3.1)


def test_the_papers_router_is_shown_first_and_then_the_best_of_other_kinds():
    gains = {("linear", "average"): 0.1, ("gains", "average"): 0.2, ("gains", "exact"): 0.3, ("random", "exact"): 0.0}
    gains |= {("linear", "exact"): 0.25}
    keys = {Key(f"{kind}-{spend}", 3, kind, spend): 4 - gain for (kind, spend), gain in gains.items()}
    rows = _rows(_draws({STATIC: 4.0} | keys))[1:]
    assert shown_routers(rows, "text") == ["linear", "gains, exact", "random, exact"]
    assert shown_routers(rows, "text", most=2) == ["linear", "gains, exact"]
    assert shown_routers(rows[1:4], "text")[0] == "gains"
    assert shown_routers([], "text") == []
