import numpy as np
import pytest

from duollm.records.bootstrap import (
    Bootstrap,
    Estimate,
    brackets,
    interval,
    interval_if,
    intervals,
    mean_draws,
    nats,
    percent,
    sum_by_document,
    whole,
    with_interval,
)


def equal(documents):
    return np.ones(documents, dtype=np.int64)


def test_ratio_equals_means_over_the_resampled_tokens():
    generator = np.random.default_rng(0)
    document_T = np.repeat(np.arange(5), [3, 1, 4, 2, 6])
    values_TQ = generator.normal(size=(16, 2))
    tokens_D = np.bincount(document_T)
    bootstrap = Bootstrap([tokens_D], samples=20, seed=1)
    draws_XQ = bootstrap.ratio(sum_by_document(values_TQ, document_T, 5), tokens_D)
    for weights_D, draw_Q in zip(bootstrap.weights_XD, draws_XQ, strict=True):
        drawn_D = weights_D / weights_D[weights_D > 0].min()
        np.testing.assert_allclose(draw_Q, np.average(values_TQ, axis=0, weights=drawn_D[document_T]))


def test_draw_zero_is_the_data_and_strata_keep_their_sizes():
    weights_XD = Bootstrap([equal(3), equal(7)], samples=50, seed=0).weights_XD
    assert (weights_XD[0] == 1).all()
    np.testing.assert_allclose(weights_XD[:, :3].sum(1), 3)
    np.testing.assert_allclose(weights_XD[:, 3:].sum(1), 7)


@pytest.mark.parametrize(("documents", "student"), [(24, 2.0687), (96, 1.9853)])
def test_the_spread_of_resamples_is_that_of_student(documents, student):
    values_D = np.random.default_rng(0).normal(size=documents)
    draws_X = Bootstrap([equal(documents)], 20_000, 0).ratio(values_D, equal(documents))
    error = values_D.std(ddof=1) / np.sqrt(documents)
    assert draws_X[1:].std() == pytest.approx(error * student / 1.96, rel=0.02)


def test_the_spread_of_resamples_counts_large_documents_as_few():
    """Nearly all tokens are in 5 of 30 documents, so the interval is about as wide as with 5."""
    values_D = np.random.default_rng(0).normal(size=30)
    few_D = np.where(np.arange(30) < 5, 1000, 1)
    assert spread(values_D * few_D, few_D) == pytest.approx(spread(values_D[:5], equal(5)), rel=0.3)


def spread(totals_D, tokens_D):
    return Bootstrap([tokens_D], 4000, 0).ratio(totals_D, tokens_D)[1:].std()


@pytest.mark.parametrize("documents", [1, 2, 3])
def test_few_documents_leave_at_least_one_in_a_resample(documents):
    weights_XD = Bootstrap([equal(documents)], 100, 0).weights_XD
    np.testing.assert_allclose(weights_XD.sum(1), documents)


def test_same_seed_same_resamples():
    one, same, other = (Bootstrap([equal(6)], 30, seed).weights_XD for seed in (1, 1, 2))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_paired_difference_is_far_tighter_than_its_parts():
    noise_D = np.random.default_rng(0).normal(size=40)
    bootstrap = Bootstrap([equal(40)], 500, 0)
    first, second = (bootstrap.ratio(noise_D + shift, np.ones(40)) for shift in (0.0, 0.1))
    whole, difference = interval(first), interval(second - first)
    assert difference.value == pytest.approx(0.1)
    assert difference.high - difference.low < 1e-9 < whole.high - whole.low


def test_interval_covers_the_true_mean_about_as_often_as_it_says():
    generator = np.random.default_rng(3)
    covered = 0
    for trial in range(200):
        estimate = interval(Bootstrap([equal(40)], 300, trial).ratio(generator.normal(2.0, 1.0, 40), np.ones(40)))
        covered += estimate.low <= 2.0 <= estimate.high
    assert 0.92 <= covered / 200 <= 0.985


def test_the_interval_of_two_pooled_domains_covers_the_mean_over_both():
    generator, tokens = np.random.default_rng(4), [np.array([50, 100] * 6), np.array([200] * 12)]
    tokens_D, mean_D, covered = np.concatenate(tokens), np.repeat([3.0, 5.0], 12), 0
    truth = (tokens_D * mean_D).sum() / tokens_D.sum()
    for trial in range(200):
        totals_D = tokens_D * (mean_D + generator.normal(size=24))
        estimate = interval(Bootstrap(tokens, 300, trial).ratio(totals_D, tokens_D))
        covered += estimate.low <= truth <= estimate.high
    assert 0.92 <= covered / 200 <= 0.985


def test_intervals_are_the_interval_of_each_column():
    draws_XQ = np.random.default_rng(0).normal(size=(101, 3))
    assert intervals(draws_XQ, 0.9)[2] == interval(draws_XQ[:, 2], 0.9)


def test_a_wider_level_gives_a_wider_interval():
    draws_X = np.random.default_rng(0).normal(size=2001)
    narrow, wide = interval(draws_X, 0.9), interval(draws_X, 0.99)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_resamples_without_a_count_are_left_out():
    draws_X = Bootstrap([equal(2)], 200, 0).ratio(np.array([3.0, 0.0]), np.array([1.0, 0.0]))
    assert np.isnan(draws_X).any()
    assert interval(draws_X).high == 3.0


def test_what_was_not_measured_has_no_interval():
    assert interval_if(None) is None
    draws_X = np.arange(5.0)
    assert interval_if(draws_X) == interval(draws_X)


class TestMeanDraws:
    def test_the_data_come_first_and_tokens_weigh_alike(self):
        nll_TP = np.random.default_rng(0).normal(size=(9, 2))
        draws_XP = mean_draws(["b"] * 2 + ["a"] * 7, nll_TP)
        np.testing.assert_allclose(draws_XP[0], nll_TP.mean(0))

    def test_the_interval_is_over_documents_and_covers_the_truth(self):
        generator, covered = np.random.default_rng(0), 0
        for offsets_D in generator.normal(size=(60, 40)):
            nll_TP = np.repeat(offsets_D, 3)[:, None] + 0.01 * generator.normal(size=(120, 1))
            estimate = interval(mean_draws(np.repeat([f"{d}" for d in range(40)], 3), nll_TP)[:, 0])
            covered += estimate.low <= 0 <= estimate.high
        assert 0.83 <= covered / 60 <= 0.995

    def test_differences_are_paired(self):
        nll_T = np.random.default_rng(0).normal(size=30)
        draws_XP = mean_draws([f"{t // 3}" for t in range(30)], np.stack([nll_T, nll_T + 1], -1))
        np.testing.assert_allclose(draws_XP[:, 1] - draws_XP[:, 0], 1)

    def test_one_document_has_no_interval(self):
        draws_XP = mean_draws(["only"] * 4, np.ones((4, 1)))
        assert draws_XP[0] == 1
        assert np.isnan(draws_XP[1:]).all()

    def test_the_seed_repeats_the_draw(self):
        nll_TP = np.random.default_rng(0).normal(size=(20, 1))
        documents = [f"{t % 5}" for t in range(20)]
        assert np.array_equal(mean_draws(documents, nll_TP, seed=3), mean_draws(documents, nll_TP, seed=3))
        assert not np.array_equal(mean_draws(documents, nll_TP, seed=3), mean_draws(documents, nll_TP, seed=4))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (nats(-0.0126), "\N{MINUS SIGN}0.013"),
        (nats(2.5, 1), "2.5"),
        (nats(None), "\N{EN DASH}"),
        (percent(-0.126), "\N{MINUS SIGN}13%"),
        (with_interval(Estimate(0.1, -0.2, 0.3)), "0.100 [\N{MINUS SIGN}0.200, 0.300]"),
        (with_interval(Estimate(0.1, -0.2, 0.3), percent), "10% [\N{MINUS SIGN}20%, 30%]"),
        (with_interval(None), "not measured"),
        (brackets(Estimate(1.0, 0.5, 2.0), whole), "[0, 2]"),
    ],
)
def test_numbers_are_printed_with_real_signs(text, expected):
    assert text == expected
