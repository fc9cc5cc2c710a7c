"""Running the stages of a study, each once: finished ones are skipped, killed ones continue, changed ones rerun.

`stages/<name>.json` in the run folder marks a finished stage, `stages/<name>.started.json` one in
progress. Both hold the stage's fingerprint: a hash of its settings, its code's version and the
fingerprints of the stages it builds on.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from duollm.files import fingerprint, read_json, remove, write_json
from duollm.terminal import working


@dataclass(frozen=True)
class Stage:
    """One step of a study.

    Attributes:
        name: name of the stage and of its marker.
        run: does the work. It may find its own unfinished outputs, made with the same fingerprint,
            and continue from them. All processes call it; the next stage begins when all have returned.
        settings: everything that the result depends on, JSON-serialisable.
        after: names of the stages whose results it reads.
        outputs: files and folders that the stage makes, relative to the run folder. No other stage makes them.
        scratch: temporary files, such as checkpoints, that exist only while the stage runs.
        kept: outputs that stay, out of date, until the stage replaces them.
        version: number to raise when the stage's code starts to give different results.
    """

    name: str
    run: Callable[[], None]
    settings: Any
    after: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    scratch: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    version: int = 1


def run_stages(
    stages: Sequence[Stage],
    folder: Path,
    until: str | None = None,
    announce: Callable[[str], None] = print,
    first: bool = True,
    wait: Callable[[], None] = lambda: None,
    ended: Callable[[str, list[str]], None] = lambda name, missing: None,
) -> None:
    """Bring the stage `until` (default: all stages) and the stages it builds on up to date, in order.

    A stage is skipped if its marker has its fingerprint and its outputs exist. Otherwise the markers of all stages that
    build on it are removed, and the stage runs. It continues on its own partial outputs if these have the same
    fingerprint; else they are removed first.

    Args:
        first: whether this process, of several that run the same stages together, writes the markers.
        wait: returns when all processes are there.
        ended: called after each stage that ran, with its name and the names of all stages that are not up to date.

    Raises:
        ValueError: `until` is not a stage, or a stage comes before one that it builds on.
    """
    fingerprints = _fingerprints(stages)
    markers = {stage.name: _Markers(stage, folder, fingerprints[stage.name]) for stage in stages}
    for name in _with_predecessors(stages, {until} if until else set(markers)):
        its = markers[name]
        finished = its.finished()
        wait()  # all processes have looked before one of them writes
        if finished:
            announce(f"{name}: unchanged")
            continue
        if first:
            for later in _successors(stages, name):
                markers[later].forget()
            announce(f"{name}: {its.begin()}")
        wait()
        start = time.perf_counter()
        with working(name) if first else nullcontext():
            its.stage.run()
        seconds = time.perf_counter() - start
        wait()
        if first:
            its.finish(seconds)
        announce(f"{name}: done in {seconds:.1f} s")
        ended(name, [other for other, each in markers.items() if not each.finished()])


@dataclass(frozen=True)
class _Markers:
    """The markers of one stage."""

    stage: Stage
    folder: Path
    fingerprint: str

    @property
    def done_marker(self) -> Path:
        return self.folder / "stages" / f"{self.stage.name}.json"

    @property
    def started_marker(self) -> Path:
        return self.folder / "stages" / f"{self.stage.name}.started.json"

    @property
    def outputs(self) -> list[Path]:
        return [self.folder / output for output in self.stage.outputs]

    def finished(self) -> bool:
        same = _fingerprint_in(self.done_marker) == self.fingerprint
        return same and all(output.exists() for output in self.outputs)

    def begin(self) -> str:
        """Mark the stage as in progress; say whether its partial outputs are kept."""
        if _fingerprint_in(self.started_marker) == self.fingerprint:
            self.done_marker.unlink(missing_ok=True)
            return "continues"
        earlier = {_fingerprint_in(self.started_marker), _fingerprint_in(self.done_marker)} - {None, self.fingerprint}
        self.forget()
        write_json(self.started_marker, {"fingerprint": self.fingerprint})
        return "starts again: its settings, its code or what it reads have changed" if earlier else "starts"

    def finish(self, seconds: float) -> None:
        missing = [str(output) for output in self.outputs if not output.exists()]
        if missing:
            raise RuntimeError(f"stage {self.stage.name} ended without making {', '.join(missing)}")
        finished_at = datetime.now(UTC).isoformat(timespec="seconds")
        marker = {"fingerprint": self.fingerprint, "seconds": round(seconds, 3), "finished_at": finished_at}
        write_json(self.done_marker, marker)
        self.started_marker.unlink()

    def forget(self) -> None:
        """Remove the markers and what was made: nobody shall read results of other settings."""
        self.done_marker.unlink(missing_ok=True)
        self.started_marker.unlink(missing_ok=True)
        for path in {*self.stage.outputs, *self.stage.scratch} - set(self.stage.kept):
            remove(self.folder / path)


def _fingerprints(stages: Sequence[Stage]) -> dict[str, str]:
    known: dict[str, str] = {}
    for stage in stages:
        late = [name for name in stage.after if name not in known]
        if late:
            raise ValueError(f"stage {stage.name} builds on {', '.join(late)}, which must come before it")
        before = {name: known[name] for name in stage.after}
        known[stage.name] = fingerprint({"settings": stage.settings, "version": stage.version, "after": before})
    return known


def _with_predecessors(stages: Sequence[Stage], names: set[str]) -> list[str]:
    order = [stage.name for stage in stages]
    unknown = names - set(order)
    if unknown:
        raise ValueError(f"no stage {unknown.pop()!r}; there are {', '.join(order)}")
    needed = set(names)
    for stage in reversed(stages):
        if stage.name in needed:
            needed.update(stage.after)
    return [name for name in order if name in needed]


def _successors(stages: Sequence[Stage], name: str) -> list[str]:
    touched = [name]
    for stage in stages:
        if set(touched) & set(stage.after):
            touched.append(stage.name)
    return touched[1:]


def _fingerprint_in(marker: Path) -> str | None:
    try:
        found = read_json(marker).get("fingerprint")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, str) else None
