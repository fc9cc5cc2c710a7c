"""Timing two things fairly: in turns, so that both see the same machine."""

import time
from collections.abc import Callable, Mapping


def alternate(runs: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Run each in turn until `seconds` have passed for each on average; return the mean seconds per run.

    The first round warms up and is not counted.
    """
    for run in runs.values():
        run()
    spent = dict.fromkeys(runs, 0.0)
    rounds = 0
    while rounds == 0 or sum(spent.values()) < seconds * len(runs):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            spent[name] += time.perf_counter() - start
        rounds += 1
    return {name: total / rounds for name, total in spent.items()}
