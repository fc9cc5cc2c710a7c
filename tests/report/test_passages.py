import numpy as np
import pytest

from duollm.records.keys import Key
from duollm.records.tokens import read_oracle, read_tokens
from duollm.report.passages import differing_passages, one_line, passages, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("the", "the"),
        (" the", " the"),
        ("\n", "↵\n"),
        ("\n\n    ", "↵\n↵\n    "),
        ("    ", "····"),
        ("\tx", "⇥x"),
        ("\r\n", "↵\n"),
        ("a\x00", "a\N{REPLACEMENT CHARACTER}"),
        ("é漢", "é漢"),
        ("", ""),
    ],
)
def test_visible(text, shown):
    assert visible(text) == shown


def test_labels_stay_on_one_line():
    assert one_line(" a\n b") == "·a↵·b"


def test_passages_shade_by_loss_and_by_gain(synthetic):
    tokens = read_oracle(synthetic[0], "prose")
    first, second = passages(tokens, big_layers=2, count=2)
    assert (first.document, second.document) == ("prose/00.txt", "prose/01.txt")
    assert len(first.tokens) == 20
    nll_T = tokens.policies[Key("all-small", 0)].nll_T[:20]
    gain_T = nll_T - tokens.oracle(2).nll_T[:20]
    for shades, values_T, full in (
        ([token.left for token in first.tokens], nll_T, first.left_full),
        ([token.right for token in first.tokens], gain_T, first.right_full),
    ):
        assert 0 < np.max(values_T) < 2 * full
        np.testing.assert_allclose(shades, np.clip(values_T / full, 0, 1), atol=0.006)
    assert f"all small {nll_T[0]:.2f}" in first.tokens[0].numbers


class TestDiffering:
    GOOD, EXACT = Key("gains_k3", 3, "gains", "average"), Key("gains_k3_exact", 3, "gains", "exact")
    LINEAR = Key("linear-k3", 3, "linear", "average")

    @pytest.fixture
    def prose(self, compared):
        return read_tokens(compared[0], "prose")[0]

    def _loss_T(self, prose, key):
        return prose.policies[key].nll_T - prose.oracle(3).nll_T

    def test_the_worst_windows_come_first(self, prose):
        first, second = differing_passages(prose, self.GOOD, 2)
        means = self._loss_T(prose, self.GOOD).reshape(8, 20).mean(1)
        worst = [prose.documents[document] for document in np.argsort(means)[::-1][:2]]
        assert [first.document, second.document] == worst
        assert len(first.tokens) == 20

    def test_long_windows_are_cut_to_the_stretch_that_loses_most(self, prose, monkeypatch):
        monkeypatch.setattr("duollm.report.passages._DIFFERING_LENGTH", 5)
        [passage] = differing_passages(prose, self.LINEAR, 1)
        loss_T = self._loss_T(prose, self.LINEAR).reshape(8, 20)
        stretches = np.lib.stride_tricks.sliding_window_view(loss_T, 5, axis=1).mean(2)
        document, start = np.unravel_index(stretches.argmax(), stretches.shape)
        shades = np.clip(loss_T[document, start : start + 5] / passage.right_full, 0, 1)
        np.testing.assert_allclose([token.right for token in passage.tokens], shades, atol=0.006)

    def test_shades_of_spending_have_the_sign_of_the_difference(self, prose):
        rows = np.flatnonzero(prose.document_T == 0)
        passage = next(one for one in differing_passages(prose, self.GOOD, 8) if one.document == "prose/00.txt")
        more_T = (prose.policies[self.GOOD].routes_TL[rows] == 2).sum(1) - 3
        assert np.sign([token.left for token in passage.tokens]).tolist() == np.sign(more_T).tolist()
        assert {-1, 0, 1} == set(np.sign(more_T).tolist())
        exact = differing_passages(prose, self.EXACT, 1)[0]
        assert all(token.left == 0 for token in exact.tokens)
        assert "+0 big layers" in exact.tokens[0].numbers
