"""Timing two things fairly: in turns, so that both see the same machine."""

import time
from collections.abc import Callable, Mapping


def alternate(runs: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Return the mean seconds per run, measured in turns as `durations` does."""
    return {name: sum(each) / len(each) for name, each in durations(runs, seconds).items()}


def durations(runs: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Run each in turn until `seconds` have passed for each on average; return the seconds of every run.

    The first round warms up and is not counted.
    """
    for run in runs.values():
        run()
    spent: dict[str, list[float]] = {name: [] for name in runs}
    total = 0.0
    while total == 0 or total < seconds * len(runs):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            spent[name].append(time.perf_counter() - start)
            total += spent[name][-1]
    return spent
