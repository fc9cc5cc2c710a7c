"""The table of routers over all budgets, for the terminal."""

from duollm.analysis.results import FamilyRow, Results
from duollm.records.bootstrap import nats, with_interval
from duollm.terminal import Cell

FAMILY_LEGEND = (
    "area: gain over static averaged over the budgets, nats per token, with its p; beats static at: budgets that all "
    "hold with 95 %, over all routers; may be best: in the 95 % model confidence set of the area"
)


def family_table(results: Results, domain: str) -> list[dict[str, Cell]]:
    """Return a row per router, by area; none if the run has no routers."""
    rows = [row for row in results.families if row.domain == domain]
    return [_cells(row) for row in sorted(rows, key=lambda row: -row.area.value if row.area else 0)]


def _cells(row: FamilyRow) -> dict[str, Cell]:
    return {
        "router": row.router,
        "area [95 %]": with_interval(row.area, lambda value: nats(value, 4)),
        "p": "" if row.area_p is None else f"{row.area_p:.2g}",
        "beats static at": ", ".join(map(str, row.beats_static)) or "none",
        "may be best": "" if row.best_p is None else "yes" if row.may_be_best else "no",
    }
