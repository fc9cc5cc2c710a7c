"""Families of comparisons against naive versions, `arch`, and simulated documents with planted effects."""

import numpy as np
import pytest

from duollm.analysis.families import (
    confidence_set,
    family_rows,
    step_down,
    studentised,
    two_sided,
    whole_resamples,
)
from duollm.records.bootstrap import Bootstrap, interval
from duollm.records.keys import STATIC, Key
from duollm.records.records import BIG, NLL, Draws, Records
from picking import pick

DOCUMENTS = 36
ROUTERS, BUDGETS = 10, 5


def gains(generator, effect_C, documents=DOCUMENTS, skew=0):
    """Sums over unequal documents of gains over static: a part that is common to all, one of each router, and a rest.

    Effects are in standard errors of their mean. Gains with skew -1 lose much on few documents.
    """
    shapes = (documents, 1), (documents, ROUTERS), (documents, len(effect_C))
    parts = [
        generator.normal(size=shape) if skew == 0 else skew * generator.exponential(size=shape) for shape in shapes
    ]
    parts[1] = np.repeat(parts[1], BUDGETS, axis=1)[:, : len(effect_C)]
    tokens_D = generator.choice([63, 126, 189], size=documents)
    gain_DC = effect_C * np.sqrt(3 / documents) + sum(parts) - 3 * skew
    return gain_DC * tokens_D[:, None], tokens_D


def stepped_down(totals_DC, tokens_D, samples=400, seed=0):
    return step_down(*studentised(totals_DC, tokens_D, whole_resamples([len(tokens_D)], samples, seed)))


def naive_step_down(t_C, null_SC):
    """Romano and Wolf (2005), one rejection after the other."""
    left, adjusted, last = list(range(len(t_C))), {}, 0.0
    while left:
        best = max(left, key=lambda c: t_C[c])
        reached = sum(max(draw[c] for c in left) >= t_C[best] for draw in null_SC)
        last = adjusted[best] = max(last, (1 + reached) / (1 + len(null_SC)))
        left.remove(best)
    return [adjusted[c] for c in range(len(t_C))]


def test_step_down_equals_its_definition():
    totals_DC, tokens_D = gains(np.random.default_rng(0), np.array([4.0, 0, 2, 3, 0, 1]))
    drawn = studentised(totals_DC, tokens_D, whole_resamples([DOCUMENTS], 100, 0))
    np.testing.assert_allclose(step_down(*drawn), naive_step_down(*drawn))


def test_the_standard_error_is_the_linearised_one_of_a_ratio_in_every_resample():
    totals_DC, tokens_D = gains(np.random.default_rng(1), np.array([1.0, 2.0]))
    counts_XD = whole_resamples([DOCUMENTS], 5, 0)
    t_C, null_SC = studentised(totals_DC, tokens_D, counts_XD)
    value_C = totals_DC.sum(0) / tokens_D.sum()
    for number, counts_D in enumerate(counts_XD):
        drawn = np.repeat(np.arange(DOCUMENTS), counts_D)
        mean_C = totals_DC[drawn].sum(0) / tokens_D[drawn].sum()
        residual_DC = totals_DC[drawn] - mean_C * tokens_D[drawn, None]
        error_C = np.sqrt((residual_DC**2).sum(0)) / tokens_D[drawn].sum()
        expected_C, found_C = ((mean_C - value_C) / error_C, null_SC[number - 1]) if number else (mean_C / error_C, t_C)
        np.testing.assert_allclose(found_C, expected_C)


def test_resamples_keep_the_strata():
    counts_XD = whole_resamples([3, 7], 50, 0)
    assert (counts_XD[0] == 1).all()
    assert (counts_XD[:, :3].sum(1) == 3).all()
    assert (counts_XD[:, 3:].sum(1) == 7).all()


def test_what_never_varies_is_not_named():
    tokens_D = np.full(20, 10)
    totals_DC = np.zeros((20, 3))
    totals_DC[:, 2] = 50 + np.random.default_rng(0).normal(size=20)
    assert stepped_down(totals_DC, tokens_D, samples=100).tolist() == [1, 1, pytest.approx(1 / 101)]
    assert confidence_set(np.ones((20, 3)), tokens_D, whole_resamples([20], 100, 0)).tolist() == [1, 1, 1]


def named(trials, planted=0.0, skew=0):
    """How often any comparison without effect is named, and how often the router with the planted effect is."""
    generator = np.random.default_rng(5)
    effect_C = np.zeros(ROUTERS * BUDGETS)
    effect_C[:BUDGETS] = planted
    p_TC = np.stack([stepped_down(*gains(generator, effect_C, skew=skew), seed=trial) for trial in range(trials)])
    idle_TC = p_TC[:, BUDGETS:] if planted else p_TC
    return (idle_TC <= 0.05).any(1).mean(), (p_TC[:, :BUDGETS] <= 0.05).any(1).mean()


def at_most(rate, trials):
    """A rate and two standard errors of the simulation."""
    return rate + 2 * np.sqrt(rate * (1 - rate) / trials)


@pytest.mark.parametrize("skew", [-1, 0, 1])
def test_among_fifty_comparisons_without_effect_any_is_named_in_at_most_5_percent(skew):
    assert named(150, skew=skew)[0] <= at_most(0.05, 150)


def test_a_router_that_gains_five_standard_errors_is_named_in_90_percent():
    idle, found = named(100, planted=5.0)
    assert found >= 0.9
    assert idle <= at_most(0.05, 100)


@pytest.mark.slow
@pytest.mark.parametrize("skew", [-1, 0, 1])
def test_the_level_and_power_of_the_step_down_over_many_trials(skew):
    assert named(2000, skew=skew)[0] <= at_most(0.05, 2000)
    idle, found = named(2000, planted=5.0, skew=skew)
    assert found >= (0.75 if skew == -1 else 0.95)
    assert idle <= at_most(0.05, 2000)


def sets(trials, behind, seed):
    """p-values of eight routers, of which the first lies `behind` standard errors behind the others."""
    generator, effect_C = np.random.default_rng(seed), np.array([-behind] + [0.0] * 7)
    simulated = (gains(generator, effect_C) for _ in range(trials))
    counts_XD = whole_resamples([DOCUMENTS], 400, seed)
    return np.stack([confidence_set(-totals_DR, tokens_D, counts_XD) for totals_DR, tokens_D in simulated])


def test_the_set_holds_the_best_router_in_95_percent():
    p_TR = sets(150, behind=0.0, seed=2)
    assert (p_TR[:, 3] <= 0.05).mean() <= at_most(0.05, 150)


def test_a_router_far_behind_is_left_out_in_90_percent():
    p_TR = sets(60, behind=6.0, seed=3)
    assert (p_TR[:, 0] <= 0.05).mean() >= 0.9
    assert (p_TR.max(1) == 1).all()


def differences(trials, effect, seed):
    generator = np.random.default_rng(seed)
    for _ in range(trials):
        totals_D1, tokens_D = gains(generator, np.array([effect]))
        yield Bootstrap([tokens_D], 999, int(generator.integers(1 << 30))).ratio(totals_D1[:, 0], tokens_D)


def test_two_sided_agrees_with_the_interval_and_rejects_a_null_in_5_percent():
    draws = list(differences(300, 0.0, seed=4))
    for draws_X in draws:
        estimate, p = interval(draws_X), two_sided(draws_X)
        assert abs(p - 0.05) < 0.005 or (p < 0.05) == (estimate.low > 0 or estimate.high < 0)
    assert np.mean([two_sided(draws_X) <= 0.05 for draws_X in draws]) <= at_most(0.05, 300)


def test_two_sided_finds_an_effect_of_four_standard_errors_in_90_percent():
    found = [two_sided(draws_X) <= 0.05 for draws_X in differences(100, -4.0, seed=6)]
    assert np.mean(found) >= 0.9


class TestAgainstArch:
    """`arch` resamples by itself, with one standard error, so p-values agree up to what that makes on 500 documents."""

    @pytest.fixture
    def loss_DR(self):
        generator = np.random.default_rng(7)
        behind_R = np.array([0, 0.1, 0.2, 0.3, 0.7])
        return generator.normal(size=(500, 1)) + behind_R + generator.normal(size=(500, 5)) * [1, 2, 1, 1, 2]

    def test_the_model_confidence_set(self, loss_DR):
        bootstrap = pytest.importorskip("arch.bootstrap", reason="needs the extra dev")
        theirs = bootstrap.MCS(loss_DR, 0.05, reps=10_000, block_size=1, method="max", bootstrap="mbb", seed=0)
        theirs.compute()
        expected_R = theirs.pvalues["Pvalue"].sort_index().to_numpy()
        ours_R = confidence_set(loss_DR, np.ones(500, dtype=np.int64), whole_resamples([500], 10_000, 0))
        np.testing.assert_allclose(ours_R, expected_R, atol=0.02)

    def test_the_step_down_names_the_same(self, loss_DR):
        bootstrap = pytest.importorskip("arch.bootstrap", reason="needs the extra dev")
        gain_DR = loss_DR[:, [2]] - loss_DR[:, [0, 1, 3, 4]]
        gain_DR /= gain_DR.std(0)  # arch does not studentise
        benchmark_D, others_DR = loss_DR[:, 2], loss_DR[:, [2]] - gain_DR
        ours_R = stepped_down(gain_DR, np.ones(500, dtype=np.int64), samples=10_000)
        for size in (0.01, 0.05, 0.2):
            theirs = bootstrap.StepM(benchmark_D, others_DR, size, block_size=1, reps=10_000, bootstrap="mbb", seed=0)
            theirs.compute()
            assert set(np.flatnonzero(ours_R <= size)) == set(theirs.superior_models)


def test_rows_judge_every_router_in_the_family_of_all():
    """`good` gains 0.3 at both budgets, `idle` nothing; `late` was measured at one budget only."""
    generator, tokens_D = np.random.default_rng(0), np.full(30, 50)
    sums = {(NLL, Key(STATIC, k)): tokens_D * (4 - 0.1 * k + 0 * tokens_D) for k in range(1, 4)}
    for kind, k, gain in (("good", 1, 0.3), ("good", 2, 0.3), ("idle", 1, 0.0), ("idle", 2, 0.0), ("late", 2, 0.3)):
        key = Key(f"{kind}_k{k}", k, kind, "average")
        sums[NLL, key] = tokens_D * (4 - 0.1 * k - gain + 0.2 * generator.normal(size=30))
    sums |= {(BIG, key): key.big_layers * tokens_D for _, key in list(sums)}
    rows = list(family_rows(Draws(Records("text", "shared", 4, (30,), tokens_D, sums), 2000, 0), 2000, 0))
    assert [row.router for row in rows] == ["good", "idle", "late"]
    good, idle, late = (pick(rows, router=name) for name in ("good", "idle", "late"))
    assert good.beats_static == good.big_layers == [1, 2]
    assert idle.beats_static == []
    assert late.beats_static == [2]
    assert good.area.value == pytest.approx(np.mean([one.value for one in good.gain]))
    assert good.may_be_best
    assert not idle.may_be_best
    assert good.area_p <= 0.05 < idle.area_p
    assert (late.area, late.area_p, late.best_p, late.may_be_best) == (None, None, None, False)


def test_without_routers_there_is_no_family():
    tokens_D = np.full(4, 10)
    sums = {(quantity, Key(STATIC, 1)): tokens_D for quantity in (NLL, BIG)}
    assert list(family_rows(Draws(Records("text", "shared", 4, (4,), tokens_D, sums), 10, 0), 10, 0)) == []
