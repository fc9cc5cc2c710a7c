import numpy as np
import pytest

from duollm.analysis.difficulty import difficulty, hard_without_gain
from duollm.records.bootstrap import Bootstrap, interval
from duollm.records.tokens import read_tokens
from picking import pick


class TestDifficulty:
    def _share(self, nll_T, gain_T):
        document_T = np.repeat(np.arange(20), len(nll_T) // 20)
        return interval(hard_without_gain(nll_T, gain_T, document_T, Bootstrap([20], 200, 0)))

    def test_the_share_equals_counting(self):
        generator = np.random.default_rng(0)
        nll_T, gain_T = generator.gamma(2, 1, 2000), generator.gamma(1, 1, 2000)
        hardest = np.argsort(nll_T)[-500:]
        share = self._share(nll_T, gain_T)
        assert share.value == pytest.approx((gain_T[hardest] < np.median(gain_T)).mean())
        assert share.low < share.value < share.high
        assert share.low < 0.5 < share.high

    def test_the_share_is_zero_where_difficulty_is_the_loss_itself(self):
        nll_T = np.random.default_rng(0).gamma(2, 1, 2000)
        assert self._share(nll_T, 0.3 * nll_T).value == 0

    def test_difficulty_is_what_the_oracle_removes(self, compared):
        run, truths, results = compared
        truth, (tokens, _) = truths["prose"], read_tokens(run, "prose")
        nll_small_T, gain_T = difficulty(tokens, 3)
        np.testing.assert_array_equal(nll_small_T, truth.nll_TR[:, 0])
        best_T = truth.nll_TR[:, truth.space.ids_with(big=3)].min(1)
        np.testing.assert_array_equal(gain_T, truth.nll_TR[:, 0] - best_T)
        row = pick(results.difficulty, domain="prose", big_layers=3)
        assert row.median_gain == pytest.approx(np.median(gain_T))
        assert [row.big_layers for row in results.difficulty if row.domain == "prose"] == [1, 2, 3, 4, 5]
