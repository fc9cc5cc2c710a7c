"""Makes the tables of the comparison, one per budget, for the terminal."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from duollm.analysis.results import ComparisonRow, Results
from duollm.records.bootstrap import MINUS, Estimate, brackets, nats, percent
from duollm.records.keys import ALL_BIG, ALL_SMALL, BEST_PATTERNS, CEILING, EXECUTED, ORACLE, RANDOM, STATIC

COLUMNS = ("nll", "gain over static", "of oracle's gain", "of ceiling", "share of big", "FLOPs", "time")
SAME_AS_ITS_ORACLE = (EXECUTED, "committed")
"""A policy and context that is not shown: it equals the oracle of that context by construction."""
_BEFORE_ROUTERS = (ALL_SMALL, RANDOM, BEST_PATTERNS, STATIC)
_AFTER_ROUTERS = (CEILING, "best-of", EXECUTED, ORACLE, ALL_BIG)


@dataclass(frozen=True)
class Cell:
    """A value with its interval, ready to print."""

    value: str
    interval: str = ""
    note: str = ""
    off: bool = False
    """Whether the value misses its budget."""

    def __str__(self) -> str:
        """Return the cell on one line."""
        note, warning = f"({self.note})" if self.note else "", "!" if self.off else ""
        return " ".join(part for part in (self.value + warning, self.interval, note) if part)


@dataclass(frozen=True)
class Line:
    """One policy at one budget. A cell is None if nothing was measured."""

    name: str
    trained: bool
    cells: dict[str, Cell | None]


def compared(results: Results) -> list[int]:
    """Return the compared budgets, ascending."""
    return sorted({row.big_layers for row in results.comparison if row.policy not in (ALL_SMALL, ALL_BIG)})


def comparison_lines(results: Results, domain: str, big_layers: int) -> list[Line]:
    """Return a line per policy at one budget: fixed policies, routers by gain, then policies that see the label."""
    rows = [
        row
        for row in results.comparison
        if row.domain == domain
        and (row.policy in (ALL_SMALL, ALL_BIG) or row.big_layers == big_layers)
        and (row.policy, row.context) != SAME_AS_ITS_ORACLE
    ]
    oracles = {row.context: row.gain_over_static for row in rows if row.policy == ORACLE}
    peeked, several = oracles.get(results.context), len(oracles) > 1
    lines = []
    for row in sorted(rows, key=_place):
        name = row.variant if row.kind else row.policy.replace("-", " ")
        name += f", {row.context}" if several and row.policy in (ORACLE, EXECUTED) else ""
        lines.append(Line(name, bool(row.kind), _cells(row, results.num_layers, peeked)))
    return lines


def columns_in_use(lines: Sequence[Line]) -> list[str]:
    """Return the columns in which something was measured."""
    return [column for column in COLUMNS if any(line.cells[column] for line in lines)]


def estimate_cell(measured: Estimate | None, form: Callable[[float], str] = nats, note: str = "") -> Cell | None:
    """Return an estimate as a cell."""
    return None if measured is None else Cell(form(measured.value), brackets(measured, form), note)


def _place(row: ComparisonRow) -> tuple[int, float]:
    """Sort key: the order of the policies, and of routers among themselves by what they gain."""
    if row.policy in _BEFORE_ROUTERS:
        return _BEFORE_ROUTERS.index(row.policy), 0.0
    if row.kind:
        return 10, -row.fair_gain.value if row.fair_gain else 0.0
    after = (place for place, start in enumerate(_AFTER_ROUTERS) if row.policy.startswith(start))
    return 11 + next(after, len(_AFTER_ROUTERS)), 0.0


def _cells(row: ComparisonRow, layers: int, peeked: Estimate | None) -> dict[str, Cell | None]:
    """Return a row's cells; `peeked` is what the oracle of the main context gains over static."""
    ungained = row.policy in (STATIC, ALL_SMALL, ALL_BIG)
    return {
        "nll": estimate_cell(row.nll),
        "gain over static": None if ungained else _signed(row.fair_gain),
        "of oracle's gain": _of_oracle(row.fair_gain, peeked) if row.kind else None,
        "of ceiling": estimate_cell(row.of_ceiling, percent) if row.kind else None,
        "share of big": _spent(row, layers),
        "FLOPs": _relative(row.relative_flops, row.router_flops_share),
        "time": _relative(row.relative_time, row.router_time_share),
    }


def _of_oracle(gain: Estimate | None, peeked: Estimate | None) -> Cell | None:
    """Return a gain as a share of the oracle's, which stands in the same table; the interval is that of the gain."""
    if gain is None or peeked is None or peeked.value <= 0:
        return None
    shares = Estimate(*(value / peeked.value for value in (gain.value, gain.low, gain.high)))
    return estimate_cell(shares, lambda value: f"{value:.1%}".replace("-", MINUS))


def _signed(measured: Estimate | None) -> Cell | None:
    """Return a difference with its sign."""
    if measured is None:
        return None

    def form(value: float) -> str:
        return nats(value, decimals=4)

    sign = "+" if measured.value > 0 else ""
    return Cell(f"{sign}{form(measured.value)}", brackets(measured, form))


def _spent(row: ComparisonRow, layers: int) -> Cell:
    """Return the share of big; of routers also how far it is from what was asked, marked where that is too far."""
    if row.within_budget is None:
        return Cell(f"{row.big_share:.1%}")
    off = 100 * (row.big_share - row.big_layers / layers)
    note = f"{off:+.1f} points".replace("-", MINUS)
    return Cell(f"{row.big_share:.1%}", note=note, off=not row.within_budget)


def _relative(value: float | None, own_share: float | None) -> Cell | None:
    if value is None:
        return None
    note = "" if own_share is None else f"router {own_share:.1%}".replace("-", MINUS)
    return Cell(f"{value:.3f}", note=note)
