import numpy as np
import pytest

from duollm.analysis.policies import pool, score_policies
from duollm.analysis.statistics import Bootstrap
from duollm.analysis.tables import read_oracle, read_patterns, read_routers
from duollm.oracle.halves import first_half
from synthetic_run import Plan, write_run


def _scores(run, domain, seed=0):
    oracle = read_oracle(run, domain)
    return score_policies(oracle, read_patterns(run, oracle), read_routers(run, oracle), seed)


@pytest.fixture(scope="module")
def prose(synthetic):
    run, truths = synthetic
    scores = _scores(run, "prose")
    rows = {(row.policy, row.big_layers): row for row in scores.in_main_context().rows}
    return scores, rows, truths["prose"]


def _mean(scores, row):
    return row.nll_D.sum() / scores.tokens_D.sum()


def test_policies_read_per_token_equal_the_truth(prose):
    scores, rows, truth = prose
    assert _mean(scores, rows["all-small", 0]) == pytest.approx(truth.nll_TR[:, 0].mean())
    assert _mean(scores, rows["all-big", 6]) == pytest.approx(truth.nll_TR[:, -1].mean())
    for k in range(7):
        allowed_TR = truth.nll_TR[:, truth.space.ids_with(big=k)]
        assert _mean(scores, rows["oracle", k]) == pytest.approx(allowed_TR.min(1).mean())
        assert _mean(scores, rows["random-patterns", k]) == pytest.approx(allowed_TR.mean())
    for k, route_T in truth.router_route_T.items():
        picked_T = truth.nll_TR[np.arange(len(route_T)), route_T]
        assert _mean(scores, rows[f"linear-k{k}", k]) == pytest.approx(picked_T.mean())


def test_static_is_chosen_on_the_other_half(prose):
    scores, rows, truth = prose
    in_first_T = first_half(12, 0)[truth.document_T]
    for k in range(7):
        allowed_TR = truth.nll_TR[:, truth.space.ids_with(big=k)]
        scored = [allowed_TR[half, allowed_TR[~half].sum(0).argmin()] for half in (in_first_T, ~in_first_T)]
        assert _mean(scores, rows["static", k]) == pytest.approx(np.concatenate(scored).mean())


def test_static_on_all_tokens_is_taken_where_it_was_run(synthetic):
    run, _ = synthetic
    oracle = read_oracle(run, "prose")
    known_T = np.random.default_rng(0).normal(3, 1, len(oracle.document_T))
    oracle.nll_static_T[2] = known_T
    scores = score_policies(oracle, read_patterns(run, oracle), [], 0)
    static = {row.big_layers: row for row in scores.rows if row.policy == "static"}
    assert _mean(scores, static[2]) == pytest.approx(known_T.mean())
    assert _mean(scores, static[3]) != pytest.approx(known_T.mean())


def test_order_of_policies_at_equal_budget(prose):
    scores, rows, _ = prose
    for k in range(7):
        policies = ("oracle", "best-of-100-routes", "static", "random-patterns")
        nll = [_mean(scores, rows[policy, k]) for policy in policies]
        assert nll == sorted(nll)


def test_routes_spend_their_budget(prose):
    scores, rows, _ = prose
    exact = [row for row in scores.rows if "ramp" not in row.policy]
    assert all(row.big_D.sum() == row.big_layers * scores.tokens_D.sum() for row in exact)
    assert rows["linear-k2", 2].kind == "linear"
    assert rows["oracle", 2].context == "shared"
    assert rows["static", 2].context is None


def test_ramps_spend_and_lose_what_their_routes_do(prose):
    scores, rows, truth = prose
    row = rows["oracle-ramp3to1", 2]
    best_T = []
    for t, position in enumerate(truth.position_T):
        k = round(3 - 2 * (position - 1) / 19)
        best_T.append(truth.nll_TR[t, truth.space.ids_with(big=k)].min())
    assert _mean(scores, row) == pytest.approx(np.mean(best_T))
    assert row.big_D.sum() == pytest.approx(2 * scores.tokens_D.sum(), rel=0.1)


def test_every_context_has_its_rows_and_the_main_one_comes_first(prose):
    scores, rows, _ = prose
    contexts = [row.context for row in scores.rows if (row.policy, row.big_layers) == ("oracle", 2)]
    assert contexts == ["shared", "committed"]
    committed = next(row for row in scores.rows if row.context == "committed")
    assert _mean(scores, committed) == pytest.approx(_mean(scores, rows["oracle", 2]) + 0.2)
    assert _mean(scores, rows["executed-together", 2]) == pytest.approx(
        _mean(scores, rows["oracle", 2]) + 0.1, abs=0.05
    )


def test_what_a_router_spends_is_drawn_with_its_loss(tmp_path):
    truth = write_run(tmp_path, Plan(overspent_share=0.25, tokens_per_document=200))["prose"]
    scores = _scores(tmp_path, "prose")
    spent = scores.spent_draws(Bootstrap(scores.strata, 10, 0))
    router = next(i for i, row in enumerate(scores.rows) if row.policy == "linear-k2")
    assert spent[router][0] == pytest.approx(truth.space.count_big(truth.router_route_T[2]).mean())
    assert spent[router][0] > 2.2
    assert (spent[0] == 0).all()


def test_pooled_means_are_means_over_all_tokens(synthetic):
    run, truths = synthetic
    parts = [_scores(run, domain) for domain in ("code", "prose")]
    everything = pool(parts)
    assert everything.strata == (12, 12)
    nll_TR = np.concatenate([truths[domain].nll_TR for domain in ("code", "prose")])
    oracle = next(row for row in everything.rows if (row.policy, row.big_layers) == ("oracle", 3))
    expected = nll_TR[:, truths["code"].space.ids_with(big=3)].min(1).mean()
    assert _mean(everything, oracle) == pytest.approx(expected)


def test_pool_keeps_only_what_every_domain_has(synthetic):
    parts = [_scores(synthetic[0], domain) for domain in ("code", "prose")]
    parts[1].rows[:] = [row for row in parts[1].rows if row.policy != "linear-k1"]
    policies = {row.policy for row in pool(parts).rows}
    assert "linear-k1" not in policies
    assert "linear-k2" in policies


def test_draws_come_in_the_order_of_the_rows(prose):
    scores, _, _ = prose
    draws = scores.nll_draws(Bootstrap(scores.strata, 10, 0))
    for row, draw_X in zip(scores.rows, draws, strict=True):
        assert draw_X.shape == (11,)
        assert draw_X[0] == pytest.approx(_mean(scores, row))
