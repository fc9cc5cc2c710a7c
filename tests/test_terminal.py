import io
import sys

import pytest

from duollm.terminal import GrowingTable, one_line, print_table, sparkline


@pytest.mark.parametrize(("encoding", "bars"), [("utf-8", "▁█ ▅"), ("ascii", "18 5")])
def test_bars_rise_with_the_values(monkeypatch, encoding, bars):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert sparkline([1.0, 3.0, None, 2.0], 1.0, 3.0) == bars


def test_equal_values_are_low_bars():
    assert set(sparkline([2.0, 2.0], 2.0, 2.0)) <= {"▁", "1"}


def test_columns_are_all_keys_in_order_and_cells_are_short(capsys):
    print_table("a title", [{"name": "one", "speed": 12345.678}, {"name": "two", "share": 0.123456, "count": None}])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].strip() == "a title"
    [head] = [line for line in lines if "name" in line]
    assert head.index("name") < head.index("speed") < head.index("share") < head.index("count")
    assert any("12,346" in line for line in lines)
    assert any("0.123 " in line and "None" not in line for line in lines)


def test_square_brackets_and_colons_are_data(capsys):
    print_table("runs/[/b] :smile:", [{"[policy]": "router:[red]x[/]", "n": 1.0}])
    shown = capsys.readouterr().out
    for text in ("runs/[/b] :smile:", "[policy]", "router:[red]x[/]"):
        assert text in shown


def test_negative_numbers_keep_their_digits(capsys):
    print_table("", [{"gain": -0.01234}, {"gain": -4321.0}])
    shown = capsys.readouterr().out
    assert "-0.0123" in shown
    assert "-4,321" in shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" the", "·the"),
        (" a\n b", "·a↵·b"),
        ("\n\n  ", "↵↵··"),
        ("\tx\r\n", "⇥x↵"),
        ("a\x00", "a\N{REPLACEMENT CHARACTER}"),
        ("é漢", "é漢"),
        ("", ""),
    ],
)
def test_the_text_of_a_token_stays_on_one_line(text, shown):
    assert one_line(text) == shown


def test_a_table_grows_and_has_a_new_head_only_where_rows_do_not_fit(capsys):
    table = GrowingTable("speed")
    table.add([{"model": "small one", "ms": 12.5}])
    first = capsys.readouterr().out
    table.add([{"model": "a larger one", "ms": 3.0}])
    table.add([{"model": "the largest model of all", "ms": 1234.5, "note": "slow"}])
    second = capsys.readouterr().out.splitlines()
    assert first == "speed\n\nmodel                   ms\nsmall one             12.5\n"
    assert second == [
        "a larger one             3",
        "",
        "model                        ms  note",
        "the largest model of all  1,234  slow",
    ]
