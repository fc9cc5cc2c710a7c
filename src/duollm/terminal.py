"""Tables, bars and texts of tokens for the terminal.

Their content is never read as rich's markup: a name may hold square brackets.
"""

import sys
from collections.abc import Mapping, Sequence

Cell = float | int | str | None
Row = Mapping[str, Cell]
_TEXT_WIDTH = 20
"""Characters for which a growing table has room in a column of text; later texts may be longer than the first."""


def print_table(title: str, rows: Sequence[Row], width: int = 160) -> None:
    """Print rows as a table; columns are the keys in order of appearance, numbers stand right.

    Args:
        width: in columns, where the output is no terminal.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title, style="table.title"))
    columns = _columns(rows)
    for column, is_number in columns.items():
        table.add_column(Text(column), justify="right" if is_number else "left")
    for row in rows:
        table.add_row(*(Text(_cell(row.get(column, ""))) for column in columns))
    Console(width=None if Console().is_terminal else width).print(table)


class GrowingTable:
    """A table whose rows are printed as they become known; rows that do not fit its columns get a new head."""

    def __init__(self, title: str) -> None:
        self.widths: dict[str, int] = {}
        print(title, flush=True)

    def add(self, rows: Sequence[Row]) -> None:
        """Print some more rows."""
        columns = _columns(rows)
        cells = [{column: _cell(row.get(column, "")) for column in columns} for row in rows]
        needed = {column: max(len(column), *(len(row[column]) for row in cells)) for column in columns}
        needed |= {column: max(_TEXT_WIDTH, needed[column]) for column, is_number in columns.items() if not is_number}
        if any(needed[column] > self.widths.get(column, 0) for column in columns):
            self.widths = {column: max(needed[column], self.widths.get(column, 0)) for column in columns}
            cells = [{}, {column: column for column in columns}, *cells]
        for row in cells:
            padded = (
                row.get(column, "").rjust(width) if columns.get(column) else row.get(column, "").ljust(width)
                for column, width in self.widths.items()
            )
            print("  ".join(padded).rstrip(), flush=True)


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


def _columns(rows: Sequence[Row]) -> dict[str, bool]:
    """The keys in order of appearance, and whether numbers stand there."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return {key: any(not isinstance(row.get(key, ""), str) for row in rows) for key in keys}


def _cell(value: Cell) -> str:
    if isinstance(value, float):
        return f"{value:,.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return "" if value is None else str(value)
