"""Speed, measured against transformers' Llama in the same process, the two alternating."""

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from duollm.machine import Precision, describe_machine
from duollm.measure.timing import durations
from duollm.terminal import GrowingTable, working

Row = dict[str, float | int | str]


def run_bench(which: str, seconds: float, precision: Precision = "fp32", as_json: bool = False) -> None:
    """Run one benchmark for about `seconds` per measurement; print each row once it is measured, or JSON at the end.

    Args:
        which: "train", "oracle" or "forward".
        precision: of the weights, for "forward"; the others choose their own.
    """
    from duollm.bench.forward import bench_forward
    from duollm.bench.search import bench_search
    from duollm.bench.training import bench_training

    benches: dict[str, Callable[[float], Iterator[list[Row]]]] = {
        "train": bench_training,
        "oracle": bench_search,
        "forward": partial(bench_forward, precision=precision),
    }
    rows: list[Row] = []
    table = None if as_json else GrowingTable(f"duollm bench {which}")
    with working(f"bench {which}", stderr=True):
        for together in benches[which](seconds):
            rows += together
            if table:
                table.add(together)
    if as_json:
        print(json.dumps({"bench": which, "machine": describe_machine(), "rows": rows}, indent=2))


def mean_seconds(runs: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Return the mean seconds per run, measured in turns as `durations` does."""
    return {name: sum(each) / len(each) for name, each in durations(runs, seconds).items()}
