from dataclasses import replace

import numpy as np
import pytest

from duollm.errors import UserError
from duollm.models.branch import Branch
from duollm.records.keys import Key
from duollm.records.patterns import PatternSums, first_half, read_patterns
from duollm.records.records import (
    FLOPS,
    Draws,
    nll_at,
    pool,
    records_of_compared_text,
    records_of_oracle_text,
)
from duollm.records.tokens import PolicyTokens, read_tokens
from duollm.records.use import AGREEING, TAKEN
from synthetic_run import Plan, write_run


def _records(run, domain, seed=0):
    tokens, _ = read_tokens(run, domain)
    return records_of_oracle_text(tokens, read_patterns(run, tokens), seed)


@pytest.fixture(scope="module")
def prose(synthetic):
    run, truths = synthetic
    return Draws(_records(run, "prose"), samples=10, seed=0), truths["prose"]


def _mean(draws, policy, k):
    return draws.nll(policy, k)[0]


def test_policies_read_per_token_equal_the_truth(prose):
    draws, truth = prose
    assert _mean(draws, "all-small", 0) == pytest.approx(truth.nll_TR[:, 0].mean())
    assert _mean(draws, "all-big", 6) == pytest.approx(truth.nll_TR[:, -1].mean())
    for k in range(7):
        allowed_TR = truth.nll_TR[:, truth.space.ids_with(big=k)]
        assert _mean(draws, "oracle", k) == pytest.approx(allowed_TR.min(1).mean())
        assert _mean(draws, "random-patterns", k) == pytest.approx(allowed_TR.mean())
    for k, route_T in truth.router_route_T.items():
        picked_T = truth.nll_TR[np.arange(len(route_T)), route_T]
        assert _mean(draws, f"linear-k{k}", k) == pytest.approx(picked_T.mean())


def test_static_is_chosen_on_the_other_half(prose):
    draws, truth = prose
    in_first_T = first_half(12, 0)[truth.document_T]
    for k in range(7):
        allowed_TR = truth.nll_TR[:, truth.space.ids_with(big=k)]
        scored = [allowed_TR[half, allowed_TR[~half].sum(0).argmin()] for half in (in_first_T, ~in_first_T)]
        assert _mean(draws, "static", k) == pytest.approx(np.concatenate(scored).mean())


def test_static_on_all_tokens_is_taken_where_it_was_run(synthetic):
    tokens, _ = read_tokens(synthetic[0], "prose")
    known_T = np.random.default_rng(0).normal(3, 1, len(tokens.document_T))
    tokens.policies[Key("static", 2)] = PolicyTokens(known_T)
    draws = Draws(records_of_oracle_text(tokens, read_patterns(synthetic[0], tokens), 0), 1, 0)
    assert _mean(draws, "static", 2) == pytest.approx(known_T.mean())
    assert _mean(draws, "static", 3) != pytest.approx(known_T.mean())


def test_order_of_policies_at_equal_budget(prose):
    for k in range(7):
        nll = [_mean(prose[0], policy, k) for policy in ("oracle", "best-of-100-routes", "static", "random-patterns")]
        assert nll == sorted(nll)


def test_routes_spend_their_budget(prose):
    draws, _ = prose
    exact = [key for key in draws.records.policies if "ramp" not in key.policy]
    assert all(np.allclose(draws.spent(key), key.big_layers, rtol=1e-12) for key in exact)
    assert Key("linear-k2", 2, "linear", "average") in draws
    assert Key("static", 2) in draws
    assert Key("static", 2, context="shared") not in draws


def test_ramps_spend_and_lose_what_their_routes_do(prose):
    draws, truth = prose
    best_T = []
    for t, position in enumerate(truth.position_T):
        k = round(3 - 2 * (position - 1) / 19)
        best_T.append(truth.nll_TR[t, truth.space.ids_with(big=k)].min())
    assert _mean(draws, "oracle-ramp3to1", 2) == pytest.approx(np.mean(best_T))
    assert draws.spent(Key("oracle-ramp3to1", 2, context="shared"))[0] == pytest.approx(2, rel=0.1)


def test_every_context_has_its_records_and_a_name_means_the_main_one(prose):
    draws, _ = prose
    contexts = [key.context for key in draws.records.policies if key[:2] == ("oracle", 2)]
    assert contexts == ["shared", "committed"]
    committed = draws[Key("oracle", 2, context="committed")]
    assert committed[0] == pytest.approx(_mean(draws, "oracle", 2) + 0.2)
    assert _mean(draws, "executed-together", 2) == pytest.approx(_mean(draws, "oracle", 2) + 0.1, abs=0.05)


def test_what_only_serves_other_quantities_is_drawn_but_stands_in_no_table(prose):
    draws, _ = prose
    drawn = Key("drawn-oracle", 2, context="shared")
    assert drawn in draws
    assert drawn not in draws.records.policies


def test_what_a_router_spends_is_drawn_with_its_loss(tmp_path):
    truth = write_run(tmp_path, Plan(overspent_share=0.25, tokens_per_document=200))["prose"]
    draws = Draws(_records(tmp_path, "prose"), 10, 0)
    spent_X = draws.spent(Key("linear-k2", 2, "linear", "average"))
    assert spent_X[0] == pytest.approx(truth.space.count_big(truth.router_route_T[2]).mean())
    assert spent_X[0] > 2.2


def test_branches_and_agreement_are_counted_by_layer(compared):
    run, truths, _ = compared
    draws, truth, key = Draws(_records(run, "prose"), 5, 0), truths["prose"], Key("gains_k3", 3, "gains", "average")
    ids = truth.space.ids_with(big=3)
    picked_TL = truth.space.decode(ids[truth.nll_TR[:, ids].argmin(1)])
    taken_TL = truth.space.decode(truth.good_route_T[3, "average"])
    np.testing.assert_allclose(draws.mean(AGREEING, key)[0], (picked_TL == taken_TL).mean(0))
    for each, routes_TL in ((key, taken_TL), (Key("oracle", 3, context="shared"), picked_TL)):
        for branch in Branch:
            np.testing.assert_allclose(draws.mean(TAKEN, each)[0][:, branch], (routes_TL == branch).mean(0))
    assert draws.mean(FLOPS, key) == pytest.approx(np.full(6, 1310))


def test_pooled_means_are_means_over_all_tokens(synthetic):
    run, truths = synthetic
    parts = [_records(run, domain) for domain in ("code", "prose")]
    everything = pool(parts)
    assert (everything.domain, everything.strata, len(everything.tokens_D)) == ("pooled", (12, 12), 24)
    nll_TR = np.concatenate([truths[domain].nll_TR for domain in ("code", "prose")])
    expected = nll_TR[:, truths["code"].space.ids_with(big=3)].min(1).mean()
    assert _mean(Draws(everything, 1, 0), "oracle", 3) == pytest.approx(expected)
    key = Key("linear-k2", 2, "linear", "average")
    halves = [Draws(one, 1, 0).mean(AGREEING, key)[0] for one in parts]
    np.testing.assert_allclose(Draws(everything, 1, 0).mean(AGREEING, key)[0], np.mean(halves, axis=0))


def test_pool_keeps_only_what_every_domain_has(synthetic):
    code, prose = (_records(synthetic[0], domain) for domain in ("code", "prose"))
    fewer = replace(prose, sums={name: sums for name, sums in prose.sums.items() if name[1].policy != "linear-k1"})
    policies = {key.policy for key in pool([code, fewer]).policies}
    assert "linear-k1" not in policies
    assert "linear-k2" in policies


def test_a_difference_of_draws_is_paired(prose):
    """Documents differ by tenths of a nat, but the policies on them move together."""
    draws, _ = prose
    static_X, random_X = draws.nll("static", 3), draws.nll("random-patterns", 3)
    assert static_X.shape == (11,)
    assert np.std(static_X - random_X) < 0.5 * np.std(static_X)


class TestComparedText:
    def _patterns(self, tokens, truth):
        nll_DR = truth.nll_TR.reshape(len(tokens.documents), -1, truth.space.size).sum(1)
        return PatternSums(tokens.documents, tokens.space, np.arange(truth.space.size), nll_DR, tokens.tokens_D)

    def test_it_holds_what_runs_without_the_label(self, compared):
        run, truths, _ = compared
        tokens, files = read_tokens(run, "prose")
        records = records_of_compared_text(tokens, files, self._patterns(tokens, truths["prose"]), 0)
        policies = {key.policy for key in records.policies}
        assert {"static", "all-small", "all-big", "linear-k2", "gains_k3_exact"} <= policies
        assert not [key for key in records.policies if key.context]
        ours, oracles = Draws(records, 5, 0), Draws(_records(run, "prose"), 5, 0)
        for key in records.policies:
            np.testing.assert_allclose(ours[key], oracles[key])
            np.testing.assert_allclose(ours.spent(key), oracles.spent(key))

    def test_policies_on_other_text_are_refused(self, compared):
        run, truths, _ = compared
        tokens, files = read_tokens(run, "prose")
        patterns = self._patterns(tokens, truths["prose"])
        with pytest.raises(UserError, match="covers other text than static"):
            records_of_compared_text(tokens, files, replace(patterns, counted_D=patterns.counted_D + 1), 0)


CURVE = {("static", k): np.array([3.0 - 0.1 * k**2, 3.0 - 0.2 * k**2]) for k in (0, 1, 2, 4)}


class TestNllAt:
    def _at(self, policy, spent_X):
        return nll_at(lambda name, k: CURVE.get((name, k)), policy, spent_X)

    def test_lies_on_the_line_between_neighbours(self):
        one, two = CURVE["static", 1], CURVE["static", 2]
        spent_X = np.array([1.25, 1.5])
        expected = [np.interp(spent, [1, 2], [one[x], two[x]]) for x, spent in enumerate(spent_X)]
        assert self._at("static", spent_X) == pytest.approx(expected)

    def test_a_whole_number_needs_no_neighbour(self):
        assert self._at("static", np.array([4.0, 4.0])) == pytest.approx(CURVE["static", 4])

    @pytest.mark.parametrize(("policy", "spent"), [("static", 2.5), ("static", 3.5), ("static", 4.5), ("oracle", 1.5)])
    def test_is_none_without_both_neighbours(self, policy, spent):
        assert self._at(policy, np.full(2, spent)) is None
