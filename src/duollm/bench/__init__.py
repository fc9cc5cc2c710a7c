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

    benches: dict[str, Callable[[float], list[Row]]] = {"train": bench_training, "oracle": bench_search}
    rows = benches[which](options.seconds)
    if options.json:
        print(json.dumps({"bench": which, "machine": describe_machine(), "rows": rows}, indent=2))
    else:
        _print_table(which, rows)


def _print_table(which: str, rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"duollm bench {which}")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        numeric = any(not isinstance(row.get(column, ""), str) for row in rows)
        table.add_column(column, justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(_cell(row.get(column, "")) for column in columns))
    Console(width=None if Console().is_terminal else 160).print(table)


def _cell(value: float | int | str) -> str:
    if isinstance(value, float):
        return f"{value:,.3g}" if value < 100 else f"{value:,.0f}"
    return str(value)
