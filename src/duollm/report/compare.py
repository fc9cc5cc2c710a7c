"""`duollm compare`: compares one or several finished runs by their results.json."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from duollm.analysis.results import Results, read_results
from duollm.errors import UserError, did_you_mean
from duollm.report.comparison import columns_in_use, compared, comparison_lines
from duollm.report.families import FAMILY_LEGEND, family_table
from duollm.terminal import Cell, print_table

_LEGEND = (
    "nats per token with 95 % intervals over documents; gains at equal spending, paired; FLOPs and time per token "
    "relative to all big, the router's own share in brackets; ! off the budget by more than 1 percentage point"
)


def print_comparison(runs: Sequence[Path], budgets: Sequence[int] | None, domain: str | None, form: str) -> None:
    """Print a table per budget. It lists the policies of all runs.

    Args:
        budgets: numbers of big layers; None for all compared budgets.
        domain: name of a domain; None for all pooled, or the only one.
        form: "table", "markdown" or "json" (the rows of `comparison` in docs/formats.md, each with its `run`).

    Raises:
        UserError: a folder has no results, or a budget or domain was not compared.
    """
    found = {unique_name(run, runs): read_results(run) for run in runs}
    chosen = {name: _domain(name, results, domain) for name, results in found.items()}
    wanted = _budgets(found, budgets)
    if form == "json":
        rows = [
            {"run": name, **asdict(row)}
            for name, results in found.items()
            for row in results.comparison
            if row.domain == chosen[name] and row.big_layers in (0, *wanted, results.num_layers)
        ]
        print(json.dumps(rows, indent=2))
        return
    for k in wanted:
        _print_budget(found, chosen, k, form)
    families = [
        {**({"run": name} if len(found) > 1 else {}), **row}
        for name, results in found.items()
        for row in family_table(results, chosen[name])
        if not budgets
    ]
    if families:
        _print("over all budgets", chosen, families, form)
        print(FAMILY_LEGEND)
    print(_LEGEND)
    for name, results in found.items():
        sizes = results.data.values()
        if more := sum(size.compared_tokens or 0 for size in sizes):
            tokens = sum(size.tokens for size in sizes)
            print(f"{name}: gains of what sees no label on {more:,} tokens, losses and oracles on {tokens:,}")


def _print_budget(found: dict[str, Results], chosen: dict[str, str], k: int, form: str) -> None:
    lines = [
        (name, line)
        for name, results in found.items()
        if k in compared(results)
        for line in comparison_lines(results, chosen[name], k)
    ]
    columns = columns_in_use([line for _, line in lines])
    rows = [
        ({"run": name} if len(found) > 1 else {})
        | {"policy": line.name}
        | {column: str(line.cells[column] or "") for column in columns}
        for name, line in lines
    ]
    _print(f"{k} big layers per token", chosen, rows, form)


def _print(title: str, chosen: Mapping[str, str], rows: Sequence[Mapping[str, Cell]], form: str) -> None:
    texts = set(chosen.values())
    title += f", {texts.pop()}" if len(texts) == 1 else ""
    if form == "table":
        print_table(title, rows)
        return
    table = [list(rows[0]), ["---"] * len(rows[0]), *(map(str, row.values()) for row in rows)]
    print(f"### {title}\n")
    print("\n".join(f"| {' | '.join(cells)} |" for cells in table) + "\n")


def _domain(name: str, results: Results, domain: str | None) -> str:
    if domain is None:
        return results.headline
    known = dict.fromkeys(row.domain for row in results.comparison)
    if domain not in known:
        raise UserError(f"domain {domain}: not in run {name}; {did_you_mean(domain, known)}")
    return domain


def _budgets(found: dict[str, Results], budgets: Sequence[int] | None) -> list[int]:
    known = sorted({k for results in found.values() for k in compared(results)})
    for k in budgets or ():
        if k not in known:
            raise UserError(f"{k} big layers were not compared; there are {', '.join(map(str, known)) or 'none'}")
    return sorted(set(budgets or known))


def unique_name(run: Path, runs: Sequence[Path]) -> str:
    """Return the folder's own name, or the path as given if another run has the same name."""
    names = [other.resolve().name for other in runs]
    return str(run) if names.count(run.resolve().name) > 1 else run.resolve().name
