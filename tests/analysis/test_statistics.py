import numpy as np
import pytest

from duollm.analysis.statistics import Bootstrap, interval, intervals, sum_by_document


def test_ratio_equals_means_over_the_resampled_tokens():
    generator = np.random.default_rng(0)
    document_T = np.repeat(np.arange(5), [3, 1, 4, 2, 6])
    values_TQ = generator.normal(size=(16, 2))
    bootstrap = Bootstrap([5], samples=20, seed=1)
    draws_XQ = bootstrap.ratio(sum_by_document(values_TQ, document_T, 5), np.bincount(document_T))
    for weights_D, draw_Q in zip(bootstrap.weights_XD, draws_XQ, strict=True):
        tokens = [values_TQ[document_T == d] for d in range(5) for _ in range(int(weights_D[d]))]
        np.testing.assert_allclose(draw_Q, np.concatenate(tokens).mean(0))


def test_draw_zero_is_the_data_and_strata_keep_their_sizes():
    weights_XD = Bootstrap([3, 7], samples=50, seed=0).weights_XD
    assert (weights_XD[0] == 1).all()
    assert (weights_XD[:, :3].sum(1) == 3).all()
    assert (weights_XD[:, 3:].sum(1) == 7).all()


def test_same_seed_same_resamples():
    one, same, other = (Bootstrap([6], 30, seed).weights_XD for seed in (1, 1, 2))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_paired_difference_is_far_tighter_than_its_parts():
    noise_D = np.random.default_rng(0).normal(size=40)
    bootstrap = Bootstrap([40], 500, 0)
    first, second = (bootstrap.ratio(noise_D + shift, np.ones(40)) for shift in (0.0, 0.1))
    whole, difference = interval(first), interval(second - first)
    assert difference.value == pytest.approx(0.1)
    assert difference.high - difference.low < 1e-9 < whole.high - whole.low


def test_interval_covers_the_true_mean_about_as_often_as_it_says():
    generator = np.random.default_rng(3)
    covered = 0
    for trial in range(200):
        estimate = interval(Bootstrap([40], 300, trial).ratio(generator.normal(2.0, 1.0, 40), np.ones(40)))
        covered += estimate.low <= 2.0 <= estimate.high
    assert 0.88 <= covered / 200 <= 0.99


def test_intervals_are_the_interval_of_each_column():
    draws_XQ = np.random.default_rng(0).normal(size=(101, 3))
    assert intervals(draws_XQ, 0.9)[2] == interval(draws_XQ[:, 2], 0.9)


def test_a_wider_level_gives_a_wider_interval():
    draws_X = np.random.default_rng(0).normal(size=2001)
    narrow, wide = interval(draws_X, 0.9), interval(draws_X, 0.99)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_resamples_without_a_count_are_left_out():
    draws_X = Bootstrap([2], 200, 0).ratio(np.array([3.0, 0.0]), np.array([1.0, 0.0]))
    assert np.isnan(draws_X).any()
    assert interval(draws_X).high == 3.0
