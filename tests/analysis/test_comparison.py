from dataclasses import replace

import numpy as np
import pytest

from duollm.analysis.comparison import compared_budgets, comparison_rows, spend_rows
from duollm.analysis.policies import CEILING, Score, Scores
from duollm.analysis.results import analyse
from duollm.analysis.statistics import Bootstrap
from synthetic_run import Plan, write_run


def _pick(rows, **wanted):
    found = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    assert len(found) == 1
    return found[0]


@pytest.fixture
def rows(compared):
    return compared[2]["comparison"]


def test_every_policy_stands_at_every_budget_of_the_routers(rows):
    at_k3 = {(row["policy"], row["context"]) for row in rows if (row["domain"], row["big_layers"]) == ("pooled", 3)}
    assert {("static", None), ("oracle", "shared"), ("linear-k3", None), ("gains_k3", None)} <= at_k3
    assert ("gains_k3_exact", None) in at_k3
    contexts = {row["context"] for row in rows if (row["policy"], row["big_layers"]) == ("oracle", 2)}
    assert contexts == {"shared", "committed"}
    assert {row["big_layers"] for row in rows if row["policy"] == "oracle"} == {1, 2, 3, 4, 5}
    assert {row["big_layers"] for row in rows if row["policy"] in ("all-small", "all-big")} == {0, 6}


def test_losses_and_gains_equal_their_definitions(compared, rows):
    truth = compared[1]["prose"]
    nll = {
        name: _pick(rows, domain="prose", big_layers=3, policy=name, context=context)["nll"]
        for name, context in (("static", None), ("oracle", "shared"), ("gains_k3_exact", None))
    }
    route_T = truth.good_route_T[3, "exact"]
    assert nll["gains_k3_exact"] == pytest.approx(truth.nll_TR[np.arange(len(route_T)), route_T].mean())
    row = _pick(rows, domain="prose", policy="gains_k3_exact")
    gain = nll["static"] - nll["gains_k3_exact"]
    assert row["gain_over_static"] == row["gain_at_spent"] == pytest.approx(gain)
    assert row["gain_over_static_low"] < gain < row["gain_over_static_high"]
    assert row["closed"] == pytest.approx(gain / (nll["static"] - nll["oracle"]))
    assert row["of_ceiling"] is None


def test_gains_are_paired(rows):
    """Documents differ by tenths of a nat; the difference of two policies on them is known far better."""
    row = _pick(rows, domain="pooled", policy="gains_k3_exact")
    assert row["gain_over_static_high"] - row["gain_over_static_low"] < 0.6 * (row["high"] - row["low"])


def test_costs_are_those_of_the_files(rows):
    row = _pick(rows, domain="prose", policy="gains_k3")
    line = 0.6 + 0.4 * 3 / 6
    assert row["flops_per_token"] == pytest.approx(1310)
    assert row["relative_flops"] == pytest.approx(1310 / 1600)
    assert row["router_flops_share"] == pytest.approx(10 / 1310)
    assert row["relative_time"] == pytest.approx(1.1 * line)
    assert row["seconds_per_token"] == pytest.approx(1.1 * line * 2e-4)
    assert _pick(rows, domain="prose", policy="static", big_layers=3)["relative_time"] == pytest.approx(line)
    oracle = _pick(rows, domain="prose", policy="oracle", context="shared", big_layers=3)
    assert oracle["relative_time"] == pytest.approx(1.05 * line)
    assert oracle["flops_per_token"] == pytest.approx(1300)
    assert _pick(rows, domain="prose", policy="all-big")["relative_time"] == 1
    assert _pick(rows, domain="prose", policy="linear-k3")["flops_per_token"] is None


def test_a_budget_is_kept_within_a_percentage_point(tmp_path):
    write_run(tmp_path, Plan(overspent_share=0.25, tokens_per_document=40, documents=4, router_budgets=(2, 3)))
    rows = analyse(tmp_path, 50)["comparison"]
    row = _pick(rows, domain="prose", policy="linear-k3")
    assert row["big_share"] > 3.2 / 6
    assert row["within_budget"] is False
    assert row["gain_at_spent"] < row["gain_over_static"]
    assert _pick(rows, domain="prose", policy="static", big_layers=3)["within_budget"] is None
    assert all(row[key] is None for row in rows for key in ("flops_per_token", "relative_time"))


def _scores(*rows):
    tokens_D = np.array([10, 10, 10])
    made = [
        Score(policy, k, nll * tokens_D + np.array([0.1, 0.0, -0.1]) * shift, big * tokens_D, **more)
        for policy, k, nll, shift, big, more in rows
    ]
    return Scores("text", "shared", 6, tokens_D, (3,), made)


def _rows(scores, compared=None):
    compared = compared or scores
    of_compared = Bootstrap(compared.strata, 50, 0)
    return list(comparison_rows(scores, Bootstrap((3,), 50, 0), compared, of_compared, None))


def test_gains_and_spending_are_of_the_larger_text_and_what_relates_to_the_oracle_of_its_own():
    router = {"kind": "gains", "spend": "average"}
    scores = _scores(
        ("static", 3, 4.0, 0, 3.0, {}),
        (CEILING, 3, 3.8, 0, 3.0, {}),
        ("oracle", 3, 3.0, 0, 3.0, {"context": "shared"}),
        ("gains_k3", 3, 3.85, 1, 3.0, router),
    )
    more = _scores(("static", 3, 3.9, 0, 3.0, {}), (CEILING, 3, 3.5, 0, 3.0, {}), ("gains_k3", 3, 3.8, 1, 3.0, router))
    rows = _rows(scores, replace(more, tokens_D=2 * more.tokens_D))
    one = _pick(rows, policy="gains_k3")
    assert one["nll"] == pytest.approx(3.85)
    assert one["closed"] == pytest.approx(0.15)
    assert one["gain_over_static"] == pytest.approx(0.1 / 2)  # sums over twice the tokens
    assert one["of_ceiling"] is None  # half of what is spent is not known
    assert (one["gain_tokens"], one["big_share"], one["within_budget"]) == (60, pytest.approx(0.25), False)
    oracle = _pick(rows, policy="oracle")
    assert oracle["gain_over_static"] == pytest.approx(1.0)
    assert oracle["gain_tokens"] == 30


def test_the_share_of_the_ceiling_that_a_router_reaches():
    scores = _scores(
        ("static", 3, 4.0, 0, 3.0, {}),
        (CEILING, 3, 3.8, 0, 3.0, {}),
        ("oracle", 3, 3.0, 0, 3.0, {"context": "shared"}),
        ("gains_k3", 3, 3.85, 1, 3.0, {"kind": "gains", "spend": "average"}),
    )
    rows = _rows(scores)
    router = _pick(rows, policy="gains_k3")
    assert router["of_ceiling"] == pytest.approx(0.75)
    assert router["of_ceiling_low"] < 0.75 < router["of_ceiling_high"]
    assert _pick(rows, policy="oracle")["of_ceiling"] == pytest.approx(5)
    assert router["closed"] == pytest.approx(0.15)


def test_no_share_of_a_ceiling_that_shows_no_gain():
    """A share of something near 0 is noise, however its sign falls out."""
    scores = _scores(
        ("static", 3, 4.0, 0, 3.0, {}),
        (CEILING, 3, 3.99, 20, 3.0, {}),
        ("gains_k3", 3, 3.85, 1, 3.0, {"kind": "gains", "spend": "average"}),
    )
    router = _pick(_rows(scores), policy="gains_k3")
    assert router["gain_at_spent"] == pytest.approx(0.15)
    assert router["of_ceiling"] is router["of_ceiling_low"] is None


def test_where_other_routes_may_skip_there_is_no_comparison_at_what_was_spent():
    scores = replace(
        _scores(
            ("static", 3, 4.0, 0, 3.0, {}),
            (CEILING, 3, 3.8, 0, 3.0, {}),
            ("gains_k3", 3, 3.85, 1, 3.0, {"kind": "gains", "spend": "average"}),
        ),
        skips=True,
    )
    router = _pick(_rows(scores), policy="gains_k3")
    assert router["gain_over_static"] == pytest.approx(0.15)
    assert router["gain_at_spent"] is router["of_ceiling"] is None


def test_the_worth_of_spending_on_average_is_paired():
    scores = _scores(
        ("gains_k3", 3, 3.85, 5, 3.1, {"kind": "gains", "spend": "average"}),
        ("gains_k3_exact", 3, 3.95, 5, 3.0, {"kind": "gains", "spend": "exact"}),
        ("linear_k3_exact", 3, 3.95, 5, 3.0, {"kind": "linear", "spend": "exact"}),
    )
    [row] = spend_rows(scores, Bootstrap((3,), 50, 0))
    assert (row["kind"], row["big_layers"]) == ("gains", 3)
    assert row["exact_minus_average"] == pytest.approx(0.1)
    assert row["exact_minus_average_low"] == pytest.approx(row["exact_minus_average_high"])
    assert row["average_mean_big_layers"] == pytest.approx(3.1)


def test_without_routers_the_searched_budgets_are_compared():
    scores = _scores(*(("oracle", k, 4.0, 0, k, {"context": "shared"}) for k in (0, 2, 4, 6)))
    assert compared_budgets(scores) == [2, 4]


def test_routers_of_both_ends_alone_leave_the_searched_budgets():
    ends = [(f"linear_k{k}", k, 4.0, 0, k, {"kind": "linear", "spend": "average"}) for k in (0, 6)]
    scores = _scores(("oracle", 2, 4.0, 0, 2, {"context": "shared"}), *ends)
    assert compared_budgets(scores) == [2]
