"""What a study says while it works: on a terminal one line that is rewritten, elsewhere a line every half minute."""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn

T = TypeVar("T")

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
            redirect_stdout=sys.stdout.isatty(),  # else results for a file would go where the line is
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
