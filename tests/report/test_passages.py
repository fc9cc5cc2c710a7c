import pytest

from duollm.report.passages import one_line, visible


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
