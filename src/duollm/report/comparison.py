"""The comparison as tables of text, one per budget: for the page and for the terminal."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from duollm.analysis.numbers import nats, percent
from duollm.analysis.policies import (
    ALL_BIG,
    ALL_SMALL,
    BEST_PATTERNS,
    CEILING,
    EXECUTED,
    ORACLE,
    RANDOM,
    STATIC,
    variant,
)
from duollm.report.style import Row

COLUMNS = ("nll", "gain over static", "gap closed", "of ceiling", "share of big", "FLOPs", "time")
SAME_AS_ITS_ORACLE = (EXECUTED, "committed")
"""A policy and context that is not shown: it equals the oracle of that context by construction."""
_BEFORE_ROUTERS = (ALL_SMALL, RANDOM, BEST_PATTERNS, STATIC)
_SURE = {True: "better", False: "worse", None: ""}


@dataclass(frozen=True)
class Cell:
    """A value with its interval, ready to print."""

    value: str
    interval: str = ""
    note: str = ""
    mark: str = ""
    """A class of the page's style: "better", "worse", "off"."""


@dataclass(frozen=True)
class Line:
    """One policy at one budget; a cell is None where nothing was measured."""

    name: str
    trained: bool
    cells: dict[str, Cell | None]


def compared(results: dict[str, Any]) -> list[int]:
    """Return the budgets that are compared, ascending."""
    ends = (ALL_SMALL, ALL_BIG)
    return sorted({row["big_layers"] for row in results["comparison"] if row["policy"] not in ends})


def comparison_lines(results: dict[str, Any], domain: str, big_layers: int) -> list[Line]:
    """Return a line for every policy at one budget: fixed ones, routers by gain, then those that see the label."""
    layers = results["model"]["num_layers"]
    rows = [
        row
        for row in results["comparison"]
        if row["domain"] == domain
        and (row["policy"] in (ALL_SMALL, ALL_BIG) or row["big_layers"] == big_layers)
        and (row["policy"], row["context"]) != SAME_AS_ITS_ORACLE
    ]
    contexts = {row["context"] for row in rows if row["policy"] == ORACLE}
    return [
        Line(_name(row, len(contexts) > 1), bool(row["kind"]), _cells(row, layers)) for row in sorted(rows, key=_place)
    ]


def columns_in_use(lines: Sequence[Line]) -> list[str]:
    """Return the columns in which something was measured."""
    return [column for column in COLUMNS if any(line.cells[column] for line in lines)]


@dataclass(frozen=True)
class SpendTable:
    """What it costs to spend exactly k on every token: a line per kind of router, a cell per budget."""

    budgets: list[int]
    lines: list[tuple[str, list[Cell | None]]]


def spend_table(results: dict[str, Any], domain: str) -> SpendTable:
    """Return nll(exactly k) - nll(k on average) of every kind at every budget, nats."""
    rows = {(row["kind"], row["big_layers"]): row for row in results["spend"] if row["domain"] == domain}
    kinds, budgets = sorted({kind for kind, _ in rows}), sorted({k for _, k in rows})
    name = "exact_minus_average"
    lines = [(kind, [_signed(rows.get((kind, k)), name, higher_is_better=False) for k in budgets]) for kind in kinds]
    return SpendTable(budgets, lines)


def _place(row: Row) -> tuple[int, float]:
    """Sort key: the order of the policies, and of routers among themselves by what they gain."""
    if row["policy"] in _BEFORE_ROUTERS:
        return _BEFORE_ROUTERS.index(row["policy"]), 0.0
    if row["kind"]:
        return 10, -(_fair_gain(row) or 0.0)
    later = (CEILING, "best-of", EXECUTED, ORACLE, ALL_BIG)
    return 11 + next((i for i, start in enumerate(later) if row["policy"].startswith(start)), len(later)), 0.0


def _name(row: Row, several_contexts: bool) -> str:
    name = variant(row) if row["kind"] else row["policy"].replace("-", " ")
    return f"{name}, {row['context']}" if several_contexts and row["policy"] in (ORACLE, EXECUTED) else name


def _cells(row: Row, layers: int) -> dict[str, Cell | None]:
    return {
        "nll": Cell(nats(row["nll"]), f"[{nats(row['low'])}, {nats(row['high'])}]"),
        "gain over static": _gain(row),
        "gap closed": _share(row, "closed" if row["closed_at_spent"] is None else "closed_at_spent"),
        "of ceiling": None if row["policy"].startswith(CEILING) else _share(row, "of_ceiling"),
        "share of big": _spent(row, layers),
        "FLOPs": _relative(row["relative_flops"], row["router_flops_share"]),
        "time": _relative(row["relative_time"], row["router_time_share"]),
    }


def _fair_gain(row: Row) -> float | None:
    """Return the gain over static at what was spent, or at k if that is not known."""
    gain: float | None = row[_gain_name(row)]
    return gain


def _gain_name(row: Row) -> str:
    return "gain_over_static" if row["gain_at_spent"] is None else "gain_at_spent"


def _gain(row: Row) -> Cell | None:
    return None if row["policy"] in (STATIC, ALL_SMALL, ALL_BIG) else _signed(row, _gain_name(row))


def _signed(row: Row | None, name: str, higher_is_better: bool = True) -> Cell | None:
    """Return a difference, marked as better or worse where its interval leaves out 0."""
    if row is None or row[name] is None:
        return None
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    above = True if low > 0 else False if high < 0 else None
    mark = _SURE[above if above is None or higher_is_better else not above]
    value, low, high = (nats(number, decimals=4) for number in (row[name], low, high))
    return Cell(f"{'+' if row[name] > 0 else ''}{value}", f"[{low}, {high}]", mark=mark)


def _share(row: Row, name: str) -> Cell | None:
    if row[name] is None:
        return None
    return Cell(percent(row[name]), f"[{percent(row[f'{name}_low'])}, {percent(row[f'{name}_high'])}]")


def _spent(row: Row, layers: int) -> Cell:
    """Return the share of big; of routers also how far it is from what was asked, marked where that is too far."""
    if row["within_budget"] is None:
        return Cell(f"{row['big_share']:.1%}")
    off = 100 * (row["big_share"] - row["big_layers"] / layers)
    note = f"{off:+.1f} points".replace("-", "\N{MINUS SIGN}")
    return Cell(f"{row['big_share']:.1%}", note=note, mark="" if row["within_budget"] else "off")


def _relative(value: float | None, own_share: float | None) -> Cell | None:
    if value is None:
        return None
    note = "" if own_share is None else f"router {own_share:.1%}".replace("-", "\N{MINUS SIGN}")
    return Cell(f"{value:.3f}", note=note)


def as_text(cell: Cell | None) -> str:
    """Return a cell on one line."""
    if cell is None:
        return ""
    note = f"({cell.note})" if cell.note else ""
    warning = "!" if cell.mark == "off" else ""
    return " ".join(part for part in (cell.value + warning, cell.interval, note) if part)


def as_markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
