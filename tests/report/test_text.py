import numpy as np
import pytest

from duollm.analysis.tables import read_oracle
from duollm.report.text import one_line, passages, visible


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
    oracle = read_oracle(synthetic[0], "prose")
    first, second = passages(oracle, big_layers=2, count=2)
    assert (first.document, second.document) == ("prose/00.txt", "prose/01.txt")
    assert len(first.tokens) == 20
    nll_T = oracle.nll_small_T[:20]
    gain_T = nll_T - oracle.nll_oracle_T[2][:20]
    for shades, values_T, full in (
        ([token.loss_shade for token in first.tokens], nll_T, first.loss_full),
        ([token.gain_shade for token in first.tokens], gain_T, first.gain_full),
    ):
        assert 0 < np.max(values_T) < 2 * full
        np.testing.assert_allclose(shades, np.clip(values_T / full, 0, 1), atol=0.006)
    assert f"all small {nll_T[0]:.2f}" in first.tokens[0].numbers
