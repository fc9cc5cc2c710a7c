"""What the terminal shows: the line of a stage at work, and tables, bars and texts of tokens.

A stage's line is rewritten in place on a terminal; elsewhere a line comes every half minute. Content is never read as
rich's markup, because a name may hold square brackets.
"""

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text

T = TypeVar("T")
Cell = float | int | str | None
Row = Mapping[str, Cell]
_TEXT_WIDTH = 20
"""Characters for which a growing table has room in a column of text; later texts may be longer than the first."""
_SECONDS_BETWEEN_LINES = 30.0


class _Line:
    """The line of one stage: rewritten in place on a terminal, printed now and then elsewhere."""

    def __init__(self, console: Console, rewritten: bool) -> None:
        texts = [TextColumn("{task." + text + "}", markup=False) for text in ("description", "fields[note]")]
        self.progress = Progress(
            *(SpinnerColumn(), texts[0], BarColumn(), TaskProgressColumn(), texts[1]),
            console=console,
            refresh_per_second=4,
            transient=True,
            disable=not rewritten,
            redirect_stdout=rewritten and sys.stdout.isatty(),  # else results for a file would go where the line is
        )
        self.printed = self.since = time.perf_counter()
        self.begun = 0.0

    def begin(self, name: str, total: float | None, done: float = 0) -> None:
        """Start a new piece of work, whose size may be unknown."""
        for task in self.progress.task_ids:
            self.progress.remove_task(task)
        self.progress.add_task(name, total=total, completed=int(done), note="")
        self.begun, self.since = done, time.perf_counter()

    def update(self, name: str, done: float, total: float, unit: str, note: str) -> None:
        """Show that `done` of `total` are done."""
        if [task.description for task in self.progress.tasks if task.total] != [name]:
            self.begin(name, total, done)
        [task] = self.progress.tasks
        now = time.perf_counter()
        # Since the start: rich's own rate needs three updates, and a search may have no more than that.
        if rate := (done - self.begun) / max(now - self.since, 1e-9):
            left = round((total - done) / rate)
            eta = f"ETA {left // 60}:{left % 60:02d}"
            note = "  ".join(filter(None, (f"{rate:,.{'0f' if rate >= 100 else '3g'}} {unit}/s", note, eta)))
        self.progress.update(task.id, completed=done, note=note)
        if self.progress.disable and now - self.printed >= _SECONDS_BETWEEN_LINES:
            self.printed = now
            print(f"{name}  {done / total:.0%}  {note}", file=self.progress.console.file, flush=True)


_line = _Line(Console(), rewritten=False)


@contextmanager
def working(name: str, stderr: bool = False) -> Iterator[None]:
    """Show that a stage works, until it ends: on a terminal, a line that `show` and `say` fill in.

    Args:
        stderr: write to standard error, where standard output takes the results.
    """
    global _line
    console = Console(stderr=stderr)
    outer, _line = _line, _Line(console, console.is_terminal)
    _line.begin(name, total=None)
    try:
        # Even a disabled line of rich 13 ends in a line break.
        with nullcontext() if _line.progress.disable else _line.progress:
            yield
    finally:
        _line = outer


def show(name: str, done: float, total: float, unit: str = "tokens", note: str = "") -> None:
    """Show how far some work is, with its rate since the first call and the time left. Cheap enough for every step."""
    _line.update(name, done, total, unit, note)


def counted(items: Iterable[T], name: str, total: int) -> Iterator[T]:
    """Yield the items and show how many are done, whatever the caller does with each."""
    for done, item in enumerate(items):
        show(name, done, total, unit=name)
        yield item


def say(text: str) -> None:
    """Say what is being done: beside the stage's name on a terminal, as a line of its own elsewhere."""
    if _line.progress.disable:
        print(text, file=_line.progress.console.file, flush=True)
    else:
        _line.progress.update(_line.progress.task_ids[0], note=text)


def print_table(title: str, rows: Sequence[Row], width: int = 160) -> None:
    """Print rows as a table; columns are the keys in order of appearance, numbers stand right.

    Args:
        width: in columns, where the output is no terminal.
    """
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
