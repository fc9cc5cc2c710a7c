"""Speed, measured against transformers' Llama in the same process, the two alternating."""

import json
from argparse import Namespace
from collections.abc import Callable

Row = dict[str, float | int | str]


def main(which: str, options: Namespace) -> None:
    """Run one benchmark for about `options.seconds` per measurement and print its table, or JSON."""
    from duollm.bench.search import bench_search
    from duollm.bench.training import bench_training
    from duollm.machine import describe_machine
    from duollm.report.terminal import print_table

    benches: dict[str, Callable[[float], list[Row]]] = {"train": bench_training, "oracle": bench_search}
    rows = benches[which](options.seconds)
    if options.json:
        print(json.dumps({"bench": which, "machine": describe_machine(), "rows": rows}, indent=2))
    else:
        print_table(f"duollm bench {which}", rows)
