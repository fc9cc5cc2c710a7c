"""Speed, measured against transformers' Llama in the same process, the two alternating."""

import json
from collections.abc import Callable
from functools import partial

from duollm.machine import Precision, describe_machine
from duollm.terminal import print_table

Row = dict[str, float | int | str]


def run_bench(which: str, seconds: float, precision: Precision = "fp32", as_json: bool = False) -> None:
    """Run one benchmark for about `seconds` per measurement and print its table, or JSON.

    Args:
        which: "train", "oracle" or "forward".
        precision: of the weights, for "forward"; the others choose their own.
    """
    from duollm.bench.forward import bench_forward
    from duollm.bench.search import bench_search
    from duollm.bench.training import bench_training

    benches: dict[str, Callable[[float], list[Row]]] = {
        "train": bench_training,
        "oracle": bench_search,
        "forward": partial(bench_forward, precision=precision),
    }
    rows = benches[which](seconds)
    if as_json:
        print(json.dumps({"bench": which, "machine": describe_machine(), "rows": rows}, indent=2))
    else:
        print_table(f"duollm bench {which}", rows)
