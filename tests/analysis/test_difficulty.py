import numpy as np
import pytest

from duollm.analysis.difficulty import difficulty, hard_without_gain
from duollm.analysis.statistics import Bootstrap, interval


def _share(nll_T, gain_T):
    document_T = np.repeat(np.arange(20), len(nll_T) // 20)
    return interval(hard_without_gain(nll_T, gain_T, document_T, Bootstrap([20], 200, 0)))


def test_equals_counting():
    generator = np.random.default_rng(0)
    nll_T, gain_T = generator.gamma(2, 1, 2000), generator.gamma(1, 1, 2000)
    hardest = np.argsort(nll_T)[-500:]
    expected = (gain_T[hardest] < np.median(gain_T)).mean()
    share = _share(nll_T, gain_T)
    assert share.value == pytest.approx(expected)
    assert share.low < share.value < share.high
    assert share.low < 0.5 < share.high


def test_is_zero_where_difficulty_is_the_loss_itself():
    nll_T = np.random.default_rng(0).gamma(2, 1, 2000)
    assert _share(nll_T, 0.3 * nll_T).value == 0


def test_difficulty_is_what_compute_removes():
    assert difficulty(np.array([3.0, 1.0]), np.array([2.5, 1.0])).tolist() == [0.5, 0.0]
