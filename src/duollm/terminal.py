"""Tables for the terminal. Their content is never read as rich's markup, because a name may hold square brackets."""

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


def _cell(value: Cell) -> str:
    if isinstance(value, float):
        return f"{value:,.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return "" if value is None else str(value)
