"""`duollm compare`: compares one or several finished runs by their results.json."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from duollm.analysis.results import ComparisonRow, Results, read_results
from duollm.errors import UserError
from duollm.records.bootstrap import MINUS, nats, percent, tenths, with_interval
from duollm.records.keys import ALL_BIG, ALL_SMALL, BEST_PATTERNS, CEILING, EXECUTED, ORACLE, RANDOM, STATIC
from duollm.terminal import Cell, print_table

COLUMNS = ("nll", "gain over static", "of oracle's gain", "of ceiling", "share of big", "FLOPs", "time")
SAME_AS_ITS_ORACLE = (EXECUTED, "committed")
"""A policy and context that is not shown: it equals the oracle of that context by construction."""
FAMILY_LEGEND = (
    "area: gain over static averaged over the budgets, nats per token, with its p; beats static at: budgets that all "
    "hold with 95 %, over all routers; may be best: in the 95 % model confidence set of the area"
)
_BEFORE_ROUTERS = (ALL_SMALL, RANDOM, BEST_PATTERNS, STATIC)
_AFTER_ROUTERS = (CEILING, "best-of", EXECUTED, ORACLE, ALL_BIG)
_small_nats = partial(nats, decimals=4)
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
    chosen = {name: results.domain_of(Path(name), domain) for name, results in found.items()}
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
    rows = [
        ({"run": name} if len(found) > 1 else {}) | row
        for name, results in found.items()
        if k in compared(results)
        for row in comparison_table(results, chosen[name], k)
    ]
    unused = {column for column in COLUMNS if not any(row[column] for row in rows)}
    shown = [{column: cell for column, cell in row.items() if column not in unused} for row in rows]
    _print(f"{k} big layers per token", chosen, shown, form)


def _print(title: str, chosen: Mapping[str, str], rows: Sequence[Mapping[str, Cell]], form: str) -> None:
    texts = set(chosen.values())
    title += f", {texts.pop()}" if len(texts) == 1 else ""
    if form == "table":
        print_table(title, rows)
        return
    table = [list(rows[0]), ["---"] * len(rows[0]), *(map(str, row.values()) for row in rows)]
    print(f"### {title}\n")
    print("\n".join(f"| {' | '.join(cells)} |" for cells in table) + "\n")


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


def compared(results: Results) -> list[int]:
    """Return the compared budgets, ascending."""
    return sorted({row.big_layers for row in results.comparison if row.policy not in (ALL_SMALL, ALL_BIG)})


def comparison_table(results: Results, domain: str, big_layers: int) -> list[dict[str, str]]:
    """Return a row per policy at one budget: fixed policies, routers by gain, then policies that see the label."""
    rows = [
        row
        for row in results.comparison
        if row.domain == domain
        and (row.policy in (ALL_SMALL, ALL_BIG) or row.big_layers == big_layers)
        and (row.policy, row.context) != SAME_AS_ITS_ORACLE
    ]
    several = len({row.context for row in rows if row.policy == ORACLE}) > 1
    table = []
    for row in sorted(rows, key=_place):
        name = row.variant if row.kind else row.policy.replace("-", " ")
        name += f", {row.context}" if several and row.policy in (ORACLE, EXECUTED) else ""
        cells = _cells(row, results.num_layers)
        table.append({"policy": name} | {column: cells.get(column, "") for column in COLUMNS})
    return table


def _place(row: ComparisonRow) -> tuple[int, float]:
    """Sort key: the order of the policies, and of routers among themselves by what they gain."""
    if row.policy in _BEFORE_ROUTERS:
        return _BEFORE_ROUTERS.index(row.policy), 0.0
    if row.kind:
        return 10, -row.fair_gain.value if row.fair_gain else 0.0
    after = (place for place, start in enumerate(_AFTER_ROUTERS) if row.policy.startswith(start))
    return 11 + next(after, len(_AFTER_ROUTERS)), 0.0


def _cells(row: ComparisonRow, layers: int) -> dict[str, str]:
    """Return the cells of what was measured."""
    gain, cells = row.fair_gain, {"nll": with_interval(row.nll), "share of big": f"{row.big_share:.1%}"}
    if gain and row.policy not in (STATIC, ALL_SMALL, ALL_BIG):
        cells["gain over static"] = ("+" if gain.value > 0 else "") + with_interval(gain, _small_nats)
    if row.of_oracle:
        cells["of oracle's gain"] = with_interval(row.of_oracle, tenths)
    if row.kind and row.of_ceiling:
        cells["of ceiling"] = with_interval(row.of_ceiling, percent)
    if row.within_budget is not None:
        off = f"{100 * (row.big_share - row.big_layers / layers):+.1f} points".replace("-", MINUS)
        cells["share of big"] += f"{'' if row.within_budget else '!'} ({off})"
    costs = {"FLOPs": (row.relative_flops, row.router_flops_share), "time": (row.relative_time, row.router_time_share)}
    for column, (relative, own_share) in costs.items():
        if relative is not None:
            own = "" if own_share is None else f" (router {own_share:.1%})".replace("-", MINUS)
            cells[column] = f"{relative:.3f}{own}"
    return cells


def family_table(results: Results, domain: str) -> list[dict[str, Cell]]:
    """Return a row per router over all budgets, by area; none if the run has no routers."""
    rows = [row for row in results.families if row.domain == domain]
    return [
        {
            "router": row.router,
            "area [95 %]": with_interval(row.area, _small_nats),
            "p": "" if row.area_p is None else f"{row.area_p:.2g}",
            "beats static at": ", ".join(map(str, row.beats_static)) or "none",
            "may be best": "" if row.best_p is None else "yes" if row.may_be_best else "no",
        }
        for row in sorted(rows, key=lambda row: -row.area.value if row.area else 0)
    ]
