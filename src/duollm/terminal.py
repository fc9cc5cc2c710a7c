"""Tables, bars and texts of tokens for the terminal.

Their content is never read as rich's markup: a name may hold square brackets.
"""

import sys
from collections.abc import Mapping, Sequence

Cell = float | int | str | None


def print_table(title: str, rows: Sequence[Mapping[str, Cell]], width: int = 160) -> None:
    """Print rows as a table; columns are the keys in order of appearance, numbers stand right.

    Args:
        width: in columns, where the output is no terminal.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title, style="table.title"))
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        numeric = any(not isinstance(row.get(column, ""), str) for row in rows)
        table.add_column(Text(column), justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(Text(_cell(row.get(column, ""))) for column in columns))
    Console(width=None if Console().is_terminal else width).print(table)


def sparkline(values: Sequence[float | None], low: float, high: float) -> str:
    """Return a bar per value, the higher the larger; a gap for None. Digits stand in where a terminal has no bars."""
    bars = "▁▂▃▄▅▆▇█"
    try:
        bars.encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except UnicodeEncodeError:
        bars = "12345678"
    step = (high - low) / (len(bars) - 1) or 1.0
    return "".join(" " if value is None else bars[round((value - low) / step)] for value in values)


def one_line(text: str) -> str:
    """Return a token's text as a label: spaces, tabs, line ends and unprintable characters become visible."""
    marks = {"\n": "↵", "\t": "⇥", " ": "·", "\r": ""}
    return "".join(marks.get(character, character if character.isprintable() else "\ufffd") for character in text)


def _cell(value: Cell) -> str:
    if isinstance(value, float):
        return f"{value:,.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return "" if value is None else str(value)
