"""Figures of the oracle's gain over static: selection noise, its parts, the predictable ceiling."""

from collections.abc import Sequence
from typing import TypeVar

from duollm.analysis.results import CeilingRow, DecompositionRow, NoiseRow, Results
from duollm.records.keys import AVERAGE, EXACT
from duollm.report.chart import Chart, Panel, Point, Series, level, lines
from duollm.report.style import Look

_GAINS = {
    "gain": Look("oracle, true labels", "#0072B2", "o"),
    "gain_drawn": Look("the same search, drawn labels", "#D55E00", "D"),
    "second_draw": Look("the picks of drawn labels on a second draw", "#882255", "v"),
}
_EXPECTED = {"gain_expected": Look("a search by the expected loss of drawn labels", "#009E73", "s")}
_PARTS = {
    "predictable": Look("predicted, k on every token", "#009E73", "s"),
    "noise": Look("selection noise", "#D55E00", "D"),
    "rest": Look("rest", "#8c8c8c", "x"),
}
_TOTAL = Look("oracle's gain over static", "#0072B2", "o")
_BY_SPEND = {AVERAGE: Look("k on average", "#0072B2", "o"), EXACT: Look("k on every token", "#009E73", "s")}
_BUDGET, _GAIN = "big layers per token", "gain over static (nats per token)"

Row = TypeVar("Row", NoiseRow, DecompositionRow)


def of_first_context(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of their first context, which is the main one if that was measured."""
    return [row for row in rows if row.context == rows[0].context]


def gains_by_budget(results: Results, domains: Sequence[str]) -> Chart:
    """Return the gains over static, with true and with drawn labels, against the budget, one panel per domain."""
    panels = []
    for domain in domains:
        rows = [row for row in of_first_context(results.selection_noise) if row.domain == domain]
        series = [
            lines(look, [Point.of(row.big_layers, getattr(row, quantity)) for row in rows])
            for quantity, look in _GAINS.items()
        ]
        panels.append(Panel(domain, _BUDGET, _GAIN, [level("static", 0), *series]))
    return Chart([panels], 5.4, 4.0, columns=2)


def gains_by_tries(results: Results, domain: str, budgets: Sequence[int]) -> Chart:
    """Return the gains over static against the number of random routes tried, one panel per budget."""
    panels = []
    for row in results.tries:
        if row.domain != domain or row.big_layers not in budgets:
            continue
        series = [
            lines(look, [Point.of(*pair) for pair in zip(row.tried, getattr(row, quantity), strict=True)])
            for quantity, look in (_GAINS | _EXPECTED).items()
        ]
        title, ticks = f"{domain}, k = {row.big_layers}", [10**power for power in range(len(str(row.tried[-1])))]
        panels.append(Panel(title, "routes tried, at random", _GAIN, [level("static", 0), *series], ticks=ticks))
    return Chart([panels], 4.4, 4.0, columns=2)


def parts_by_budget(results: Results, domains: Sequence[str]) -> Chart:
    """Return the parts of the oracle's gain against the budget, one panel per domain."""
    panels = []
    for domain in domains:
        rows = [row for row in of_first_context(results.decomposition) if row.domain == domain]
        series = [
            Series(look, [Point.of(row.big_layers, getattr(row, quantity)) for row in rows], form)
            for quantity, look, form in (*((*part, "bars") for part in _PARTS.items()), ("total", _TOTAL, "points"))
        ]
        panels.append(Panel(domain, _BUDGET, _GAIN, [level("static", 0), *series]))
    return Chart([panels], 5.4, 4.0, columns=5)


def gain_by_depth(results: Results, domains: Sequence[str], big_layers: int) -> Chart:
    """Return the ceiling's gain against the last layer that its predictor sees, at one budget."""
    panels = []
    for domain in domains:
        rows = [row for row in results.ceiling if (row.domain, row.big_layers) == (domain, big_layers)]
        series = [one for spend, look in _BY_SPEND.items() for one in _depths(rows, spend, look)]
        title = f"{domain}, k = {big_layers}"
        panels.append(Panel(title, "last layer whose states are seen", _GAIN, [level("static", 0), *series]))
    return Chart([panels], 5.4, 3.6)


def _depths(rows: Sequence[CeilingRow], spend: str, look: Look) -> list[Series]:
    fitted, shuffled = (
        [Point.of(row.depth, row.gain) for row in rows if (row.spend, row.shuffled) == (spend, control)]
        for control in (False, True)
    )
    control = Look(f"shuffled, {look.label}", look.colour, "x")
    return [*([lines(look, fitted)] if fitted else []), *([Series(control, shuffled, "points")] if shuffled else [])]
