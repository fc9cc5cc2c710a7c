import re
from io import BytesIO, StringIO, TextIOWrapper

import pytest
import torch
from rich.console import Console

from duollm.saved.coloured import print_legend, print_piece, print_routes

ROUTES = torch.tensor([[2, 1, 0, 2], [1, 1, 1, 1]])
PLAIN = {"piped": {}, "NO_COLOR": {"force_terminal": True, "color_system": "truecolor", "no_color": True}}


def console(**options):
    return Console(file=StringIO(), width=20, **options)


@pytest.mark.parametrize("options", PLAIN.values(), ids=PLAIN.keys())
def test_without_colour_text_comes_as_it_is(options):
    terminal, text = console(**options), "a [bold] line\tlonger than the terminal is wide\n\n  :smile: "
    print_piece(terminal, text, 0.5)
    print_piece(terminal, "x", 1.0)
    print_legend(terminal)
    assert terminal.file.getvalue() == text + "x"


def test_colours_say_how_much_was_spent_and_the_legend_names_them():
    terminal = console(force_terminal=True, color_system="truecolor")
    for share in (0.0, 0.1, 0.5, 1.0):
        print_piece(terminal, "x", share)
    print_legend(terminal)
    pieces, legend = terminal.file.getvalue().split("big layers per token:")
    colour_of = re.compile(r"\x1b\[38;2;([\d;]+)m([^\x1b]*)")
    none, tenth, half, whole = (colour for colour, _ in colour_of.findall(pieces))
    assert none == tenth
    assert len({none, half, whole}) == 3
    named = {label.strip(): colour for colour, label in colour_of.findall(legend)}
    assert (named["0%"], named["50%"], named["100%"]) == (none, half, whole)
    assert len(named) == 5


def test_a_strip_has_a_mark_per_layer():
    terminal = console()
    print_routes(terminal, [" the", "\n"], ROUTES)
    head, *lines = terminal.file.getvalue().splitlines()
    assert head == "routes, layer 0 first: · skip, ▪ small, █ big"
    assert lines == ["█▪·█ 2 big  ·the", "▪▪▪▪ 0 big  ↵"]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_strip_has_digits_where_a_terminal_lacks_the_marks(encoding):
    file = TextIOWrapper(BytesIO(), encoding, errors="replace", newline="\n")
    print_routes(Console(file=file, width=20), [" é"], ROUTES[:1])
    file.flush()
    head, line = file.buffer.getvalue().decode(encoding).splitlines()
    assert head == "routes, layer 0 first: 0 skip, 1 small, 2 big"
    assert line.startswith("2102 2 big  ")
