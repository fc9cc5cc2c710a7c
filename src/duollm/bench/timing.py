"""Mean times of things that are run in turns, so that all see the same machine."""

from collections.abc import Callable, Mapping

from duollm.measure.timing import durations


def alternate(runs: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Return the mean seconds per run, measured in turns as `durations` does."""
    return {name: sum(each) / len(each) for name, each in durations(runs, seconds).items()}
