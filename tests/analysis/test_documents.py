import numpy as np
import pytest

from duollm.analysis.documents import mean_draws
from duollm.analysis.statistics import interval

RANDOM = np.random.default_rng(0)


def test_the_data_come_first_and_tokens_weigh_alike():
    nll_TP = RANDOM.normal(size=(9, 2))
    draws_XP = mean_draws(["b"] * 2 + ["a"] * 7, nll_TP)
    np.testing.assert_allclose(draws_XP[0], nll_TP.mean(0))


def test_the_interval_is_over_documents_and_covers_the_truth():
    offsets = RANDOM.normal(size=(60, 40))
    covered = 0
    for offsets_D in offsets:
        nll_TP = np.repeat(offsets_D, 3)[:, None] + 0.01 * RANDOM.normal(size=(120, 1))
        estimate = interval(mean_draws(np.repeat([f"{d}" for d in range(40)], 3), nll_TP)[:, 0])
        covered += estimate.low <= 0 <= estimate.high
    assert 0.83 <= covered / 60 <= 0.995


def test_differences_are_paired():
    nll_T = RANDOM.normal(size=30)
    draws_XP = mean_draws([f"{t // 3}" for t in range(30)], np.stack([nll_T, nll_T + 1], -1))
    np.testing.assert_allclose(draws_XP[:, 1] - draws_XP[:, 0], 1)


def test_one_document_has_no_interval():
    draws_XP = mean_draws(["only"] * 4, np.ones((4, 1)))
    assert draws_XP[0] == 1
    assert np.isnan(draws_XP[1:]).all()


def test_the_seed_repeats_the_draw():
    nll_TP = RANDOM.normal(size=(20, 1))
    documents = [f"{t % 5}" for t in range(20)]
    assert mean_draws(documents, nll_TP, seed=3)[1:] == pytest.approx(mean_draws(documents, nll_TP, seed=3)[1:])
    assert not np.array_equal(mean_draws(documents, nll_TP, seed=3), mean_draws(documents, nll_TP, seed=4))
