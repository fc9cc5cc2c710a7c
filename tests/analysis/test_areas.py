import numpy as np
import pytest

from duollm.analysis.families import areas, compared_budgets, fair_gain, gain_at_spent, gain_totals, router_gains
from duollm.records.keys import STATIC, Key
from duollm.records.records import BIG, NLL, Draws, Records

SIZES = np.array([10, 20, 30, 40])


def draws_of(nll, spent=(), skips=False):
    """Policies with the same loss on every token, which spend k unless `spent` says otherwise."""
    sums = {(NLL, key): SIZES * value for key, value in nll.items()}
    sums |= {(BIG, key): SIZES * dict(spent).get(key, float(key.big_layers)) for key in nll}
    return Draws(Records("text", "shared", 6, (4,), SIZES, sums, skips), samples=20, seed=0)


def router(k, kind="gains", spend="average"):
    return Key(f"{kind}_{spend}_k{k}", k, kind, spend)


STATICS = {Key(STATIC, k): 4 - 0.1 * k for k in range(7)}


def test_without_routers_the_searched_budgets_are_compared():
    oracles = {Key("oracle", k, context="shared"): 4.0 for k in (0, 2, 4, 6)}
    assert compared_budgets(draws_of(oracles).records) == [2, 4]
    ends = {router(k, "linear"): 4.0 for k in (0, 6)}
    assert compared_budgets(draws_of(oracles | ends).records) == [2, 4]


def test_the_fair_gain_is_over_static_at_what_was_spent():
    draws = draws_of(STATICS | {router(2): 3.7}, spent={router(2): 2.5})
    np.testing.assert_allclose(fair_gain(draws, router(2)), 3.75 - 3.7)
    np.testing.assert_allclose(gain_at_spent(draws, router(2)), 3.75 - 3.7)


def test_the_fair_gain_is_over_static_at_k_where_that_is_all_there_is():
    skipping = draws_of(STATICS | {router(2): 3.7}, spent={router(2): 2.5}, skips=True)
    assert gain_at_spent(skipping, router(2)) is None
    np.testing.assert_allclose(fair_gain(skipping, router(2)), 3.8 - 3.7)
    assert fair_gain(draws_of({router(2): 3.7}), router(2)) is None


def test_the_area_is_the_mean_gain_by_the_trapezoid_rule():
    gain = {1: 0.1, 2: 0.3, 5: 0.2}
    draws = draws_of(STATICS | {router(k): 4 - 0.1 * k - value for k, value in gain.items()})
    expected = (1 * (0.1 + 0.3) / 2 + 3 * (0.3 + 0.2) / 2) / 4
    np.testing.assert_allclose(areas(draws)["gains"], expected)
    assert list(router_gains(draws)["gains"]) == [1, 2, 5]


def test_the_area_of_one_budget_is_its_gain():
    draws = draws_of(STATICS | {router(3): 3.5})
    assert areas(draws)["gains"][0] == pytest.approx(0.2)


def test_a_router_that_was_not_measured_at_all_budgets_has_no_area():
    nll = {router(k): 3.0 for k in (1, 3)} | {router(3, "linear"): 3.0, router(3, spend="exact"): 3.0}
    draws = draws_of(STATICS | nll)
    assert list(router_gains(draws)) == ["gains", "gains, exact", "linear"]
    assert list(areas(draws)) == ["gains"]


@pytest.mark.parametrize("skips", [False, True])
def test_totals_have_the_gain_as_their_mean_and_follow_it_in_resamples(skips):
    generator, tokens_D = np.random.default_rng(0), np.arange(20, 60)
    sums = {(NLL, Key(STATIC, k)): tokens_D * (4 - 0.1 * k + 0.05 * generator.normal(size=40)) for k in range(7)}
    sums[NLL, router(2)] = tokens_D * (3.7 + 0.2 * generator.normal(size=40))
    sums |= {(BIG, key): tokens_D * float(key.big_layers) for _, key in list(sums)}
    sums[BIG, router(2)] = tokens_D * (2.4 + 0.2 * generator.normal(size=40))
    draws = Draws(Records("text", "shared", 6, (40,), tokens_D, sums, skips), samples=200, seed=0)
    mean_X = draws.bootstrap.ratio(gain_totals(draws, router(2)), tokens_D)
    gain_X = fair_gain(draws, router(2))
    assert mean_X[0] == pytest.approx(gain_X[0], abs=1e-12)
    assert np.abs(mean_X - gain_X).max() < 0.1 * gain_X.std()
    np.testing.assert_allclose(areas(draws, gain_totals)["gains"], gain_totals(draws, router(2)))


def test_no_totals_without_static():
    assert gain_totals(draws_of({router(2): 3.7}), router(2)) is None
