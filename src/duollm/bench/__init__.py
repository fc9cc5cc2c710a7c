"""Speed, measured against transformers' Llama in the same process, the two alternating."""

import json
from argparse import Namespace
from collections.abc import Callable
from functools import partial

from duollm.errors import UserError

Row = dict[str, float | int | str]


def main(which: str, options: Namespace) -> None:
    """Run one benchmark for about `options.seconds` per measurement and print its table, or JSON.

    Raises:
        UserError: a precision is given for a benchmark that chooses its own.
    """
    if options.precision and which != "forward":
        raise UserError(f"--precision goes with 'bench forward' only, got 'bench {which}'; leave it out")
    from duollm.bench.forward import bench_forward
    from duollm.bench.search import bench_search
    from duollm.bench.training import bench_training
    from duollm.machine import describe_machine
    from duollm.terminal import print_table

    benches: dict[str, Callable[[float], list[Row]]] = {
        "train": bench_training,
        "oracle": bench_search,
        "forward": partial(bench_forward, precision=options.precision or "fp32"),
    }
    rows = benches[which](options.seconds)
    if options.json:
        print(json.dumps({"bench": which, "machine": describe_machine(), "rows": rows}, indent=2))
    else:
        print_table(f"duollm bench {which}", rows)
