"""Generated text on the terminal: coloured by the share of big layers that each piece cost, and as route strips."""

from collections.abc import Sequence

from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style
from torch import Tensor

from duollm.models.branch import Branch
from duollm.report.passages import one_line

_SHADES = [Style(color=colour) for colour in ("#3b7dd8", "#3f9fa0", "#7f9a3c", "#cf8a2b", "#d1495b")]
_MARKS = {Branch.SKIP: "·", Branch.SMALL: "▪", Branch.BIG: "█"}
_DIGITS = {branch: str(branch.value) for branch in Branch}


def print_piece(console: Console, piece: str, share: float | None = None) -> None:
    """Print a piece of text as it is, in the colour of its share of big layers (None: as part of the prompt)."""
    style = Style(dim=True) if share is None else _shade(share)
    console.print(Segments([Segment(piece, style)]), end="", crop=False)
    console.file.flush()


def print_legend(console: Console) -> None:
    """Say what the colours mean, where there are colours."""
    if console.color_system is None or console.no_color:
        return
    steps = [Segment(f" {index / (len(_SHADES) - 1):.0%}", shade) for index, shade in enumerate(_SHADES)]
    console.print(Segments([Segment("big layers per token:"), *steps, Segment("\n")]), end="", crop=False)


def print_routes(console: Console, tokens: Sequence[str], routes_GL: Tensor) -> None:
    """Print a line per token: a mark per layer, layer 0 first, the number of big layers, and the token."""
    marks = _marks(console.encoding)
    meanings = ", ".join(f"{marks[each]} {each.name.lower()}" for each in Branch)
    console.print(f"routes, layer 0 first: {meanings}", soft_wrap=True)
    for token, route in zip(tokens, routes_GL.tolist(), strict=True):
        share = route.count(Branch.BIG) / len(route)
        strip = "".join(marks[Branch(branch)] for branch in route)
        label = f" {route.count(Branch.BIG):>{len(str(len(route)))}} big  {one_line(token)}\n"
        console.print(Segments([Segment(strip, _shade(share)), Segment(label)]), end="", crop=False)


def _marks(encoding: str) -> dict[Branch, str]:
    """Digits where a terminal lacks the marks, as all would look the same."""
    try:
        "".join(_MARKS.values()).encode(encoding)
    except UnicodeEncodeError:
        return _DIGITS
    return _MARKS


def _shade(share: float) -> Style:
    return _SHADES[round(share * (len(_SHADES) - 1))]
