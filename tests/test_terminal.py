"""The line of a stage, rewritten on a terminal, printed every half minute elsewhere; tables, bars, texts of tokens."""

import io
import sys

import pytest
from rich.console import Console

from duollm import terminal as module
from duollm.terminal import GrowingTable, counted, one_line, print_table, say, show, sparkline, working


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests set by hand."""
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    return now


@pytest.fixture
def terminal(monkeypatch):
    """A terminal in which everything is shown."""
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=120)
    monkeypatch.setattr(module, "Console", lambda stderr: console)
    return shown


def test_where_output_is_piped_a_line_comes_every_half_minute(clock, capsys):
    with working("oracle"):
        for second in range(100):
            clock[0] += 1
            show("oracle prose", 2 * second, 400, note="loss [1]")
    assert capsys.readouterr().out.splitlines() == [
        "oracle prose  14%  2 tokens/s  loss [1]  ETA 2:51",
        "oracle prose  30%  2 tokens/s  loss [1]  ETA 2:21",
        "oracle prose  44%  2 tokens/s  loss [1]  ETA 1:51",
    ]


def test_items_are_counted_while_they_are_used(clock, capsys):
    with working("evaluate"):
        for _ in counted("abc", "routers", 3):
            clock[0] += 31
    assert capsys.readouterr().out.splitlines() == [
        "routers  33%  0.0323 routers/s  ETA 1:02",
        "routers  67%  0.0323 routers/s  ETA 0:31",
    ]


def test_a_new_piece_of_work_has_its_own_rate(clock, capsys):
    with working("oracle"):
        for name, per_second in (("prose", 1), ("code", 5)):
            for second in range(31):
                clock[0] += 1
                show(name, per_second * second, 200)
    first, second = capsys.readouterr().out.splitlines()
    assert "1 tokens/s" in first
    assert "5 tokens/s" in second


def test_a_terminal_has_one_line_that_goes_in_the_end(terminal, clock):
    with working("oracle"):
        show("oracle prose", 10, 40)
        clock[0] += 10
        show("oracle prose", 20, 40, note="loss 1.5")
        module._line.progress.refresh()
    shown = terminal.getvalue()
    assert "oracle prose" in shown
    assert "50%" in shown
    assert "1 tokens/s  loss 1.5" in shown
    assert "ETA 0:20" in shown
    assert shown.endswith("\x1b[?25h\x1b[1A\x1b[2K") or shown.rstrip().endswith("\x1b[2K"), "the line is erased"


def test_what_is_said_stands_beside_the_stage_on_a_terminal_and_alone_elsewhere(terminal, capsys, monkeypatch):
    with working("data"):
        say("packing [tokens]")
        module._line.progress.refresh()
    assert "packing [tokens]" in terminal.getvalue()
    assert capsys.readouterr().out == ""
    monkeypatch.undo()
    say("packing [tokens]")
    assert capsys.readouterr().out == "packing [tokens]\n"


def test_results_for_a_file_stay_out_of_the_line_on_a_terminal(terminal, capsys):
    with working("trace", stderr=True):
        print("domain,document")
    assert capsys.readouterr().out == "domain,document\n"
    assert "domain" not in terminal.getvalue()


def test_the_line_of_a_stage_that_fails_is_gone_too():
    before = module._line
    with pytest.raises(KeyboardInterrupt), working("oracle"):
        raise KeyboardInterrupt
    assert module._line is before


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
