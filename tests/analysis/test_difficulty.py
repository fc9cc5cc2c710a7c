from dataclasses import replace

import numpy as np
import pytest

from duollm.analysis.difficulty import (
    LINE_STARTS,
    class_rows,
    difficulty,
    hard_without_gain,
    helped_rows,
    with_difficulty,
)
from duollm.records.bootstrap import Bootstrap, interval
from duollm.records.keys import ALL_SMALL, ORACLE, Key
from duollm.records.patterns import first_half
from duollm.records.records import Records
from duollm.records.tokens import read_tokens
from picking import pick
from synthetic_run import Plan, write_run


class TestDifficulty:
    def _share(self, nll_T, gain_T):
        document_T = np.repeat(np.arange(20), len(nll_T) // 20)
        return interval(hard_without_gain(nll_T, gain_T, document_T, Bootstrap([np.ones(20, np.int64)], 200, 0)))

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


class TestClasses:
    def test_all_tokens_equal_the_truth(self, compared):
        run, truths, results = compared
        truth, (tokens, _) = truths["prose"], read_tokens(run, "prose")
        row = pick(results.difficulty_by_class, domain="prose", kind="all")
        nll_small_T, gain_T = difficulty(tokens, 2)
        high_T = nll_small_T >= np.quantile(nll_small_T, 0.75)
        best_T = np.minimum(truth.nll_TR[:, -1], nll_small_T - gain_T)
        assert row.gain.value == pytest.approx(gain_T.mean())
        assert row.gain_all_big.value == pytest.approx((nll_small_T - truth.nll_TR[:, -1]).mean())
        assert row.gain_drawn.value == pytest.approx(0.4, abs=0.1)
        assert row.unhelped.value == pytest.approx((nll_small_T - best_T < 0.1)[high_T].mean())
        assert (row.tokens, row.high_loss.value) == (160, 0.25)

    def test_each_class_counts_its_own_tokens(self, compared, monkeypatch):
        """Line starts are made hard, and nothing helps them."""
        tokens, _ = read_tokens(compared[0], "code")
        class_T = np.where(np.arange(160) % 4 == 0, "line start", "word start")
        monkeypatch.setattr(
            "duollm.analysis.difficulty.classes_of", lambda tokens: {"form": class_T, "python": class_T}
        )
        starts_T = class_T == "line start"
        nll_T = tokens.policies[Key(ALL_SMALL, 0)].nll_T
        policies = {
            key: replace(one, nll_T=np.where(starts_T, nll_T + 5, one.nll_T)) for key, one in tokens.policies.items()
        }
        planted = replace(tokens, policies=policies)
        bootstrap = Bootstrap([np.ones(8, np.int64)], 50, 0)
        rows = {row.name: row for row in class_rows(planted, bootstrap) if row.kind == "python"}
        assert rows["line start"].tokens == 40
        assert rows["line start"].gain.value == 0
        assert rows["line start"].unhelped.value == 1
        assert rows["word start"].gain.value == pytest.approx(difficulty(tokens, 2)[1][~starts_T].mean())
        records = with_difficulty(Records("code", "shared", 6, (8,), tokens.tokens_D, {}), planted)
        sums_D23 = records.sums[LINE_STARTS, Key(ORACLE, 2, context="shared")]
        assert sums_D23[:, :, 0].sum(0).tolist() == [120, 40]
        assert sums_D23[:, 1, 2].sum() == 0

    def test_the_tokens_helped_most_are_scored_on_other_documents(self, compared):
        run, _, results = compared
        tokens, _ = read_tokens(run, "prose")
        gain_T, in_first_T = difficulty(tokens, 2)[1], first_half(8, 0)[tokens.document_T]
        texts = np.array(tokens.text)
        ranked = sorted(set(tokens.text), key=lambda text: -gain_T[(texts == text) & in_first_T].mean())
        rows = [row for row in results.helped_most if row.domain == "prose"]
        assert [row.text for row in rows] == ranked
        for row in rows:
            assert row.gain == pytest.approx(gain_T[(texts == row.text) & ~in_first_T].mean())

    def test_the_text_of_a_token_stays_whole(self, tmp_path):
        write_run(tmp_path, Plan(documents=8), {"prose": ["\0", "a\0", "\n"]})
        rows = helped_rows(read_tokens(tmp_path, "prose")[0], seed=0)
        assert {row.text for row in rows} == {"\0", "a\0", "\n"}
