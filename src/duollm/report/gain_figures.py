"""Figures of the oracle's gain over static: selection noise, its parts, the predictable ceiling."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from duollm.analysis.results import CeilingRow, DecompositionRow, NoiseRow, Results
from duollm.records.bootstrap import Estimate
from duollm.records.keys import AVERAGE, EXACT
from duollm.report import style
from duollm.report.style import Look

_GAINS = {
    "gain": Look("oracle, true labels", "#0072B2", "o"),
    "gain_drawn": Look("the same search, drawn labels", "#D55E00", "D"),
    "second_draw": Look("the picks of drawn labels on a second draw", "#882255", "v"),
}
_EXPECTED = {"gain_expected": Look("a search by the expected loss of drawn labels", "#009E73", "s")}
_PARTS = {
    "predictable": Look("predictable here", "#009E73", "s"),
    "noise": Look("selection noise", "#D55E00", "D"),
    "rest": Look("rest", "#8c8c8c", "x"),
}
_TOTAL = Look("oracle's gain over static", "#0072B2", "o")
_BAR = 0.25
_BY_SPEND = {AVERAGE: Look("k on average", "#0072B2", "o"), EXACT: Look("k on every token", "#009E73", "s")}
_GAIN_LABEL = "gain over static (nats per token)"

Row = TypeVar("Row", NoiseRow, DecompositionRow)


def of_first_context(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of their first context, which is the main one if that was measured."""
    return [row for row in rows if row.context == rows[0].context]


def ceiling_budget(results: Results, wanted: int) -> int:
    """Return the budget nearest to `wanted` at which the ceiling was measured, or `wanted` if it was not measured."""
    measured = sorted({row.big_layers for row in results.ceiling})
    return min(measured, key=lambda k: abs(k - wanted), default=wanted)


def gains_by_budget(results: Results, domains: Sequence[str]) -> Figure:
    """Draw the gains over static, with true and with drawn labels, against the budget, one panel per domain."""
    rows = of_first_context(results.selection_noise)
    figure, panels = style.domain_panels(domains, 4.0, "big layers per token", _GAIN_LABEL)
    for domain, axes in panels.items():
        mine = [row for row in rows if row.domain == domain]
        axes.axhline(0, color=style.GREY, linestyle=":", linewidth=1.2, label="static")
        for quantity, look in _GAINS.items():
            _draw_line(axes, [row.big_layers for row in mine], [getattr(row, quantity) for row in mine], look)
    style.legend_below(figure, axes, columns=2)
    return figure


def gains_by_tries(results: Results, domain: str, budgets: Sequence[int]) -> Figure:
    """Draw the gains over static against the number of random routes tried, one panel per budget."""
    rows = {row.big_layers: row for row in results.tries if row.domain == domain and row.big_layers in budgets}
    figure, [line] = style.panels(1, len(rows), 4.4, 4.0)
    for axes, (k, row) in zip(line, rows.items(), strict=True):
        axes.axhline(0, color=style.GREY, linestyle=":", linewidth=1.2, label="static")
        for quantity, look in (_GAINS | _EXPECTED).items():
            _draw_line(axes, row.tried, getattr(row, quantity), look)
        axes.set(title=f"{domain}, k = {k}", xscale="log", xlabel="routes tried, at random", ylabel=_GAIN_LABEL)
    style.legend_below(figure, line[0], columns=2)
    return figure


def parts_by_budget(results: Results, domains: Sequence[str]) -> Figure:
    """Draw the parts of the oracle's gain against the budget, one panel per domain."""
    rows = of_first_context(results.decomposition)
    figure, panels = style.domain_panels(domains, 4.0, "big layers per token", _GAIN_LABEL)
    for domain, axes in panels.items():
        mine = [row for row in rows if row.domain == domain]
        budgets = np.array([row.big_layers for row in mine])
        axes.axhline(0, color=style.GREY, linewidth=1)
        for place, (quantity, look) in enumerate(_PARTS.items()):
            parts: list[Estimate] = [getattr(row, quantity) for row in mine]
            at, height, error = budgets + (place - 1) * _BAR, [part.value for part in parts], style.errors(parts)
            axes.bar(at, height, _BAR, color=look.colour, yerr=error, capsize=2, label=look.label)
        total, error, look = [row.total.value for row in mine], style.errors([row.total for row in mine]), _TOTAL
        axes.errorbar(budgets, total, error, color=look.colour, fmt=look.marker, capsize=3, label=look.label)
    style.legend_below(figure, axes, columns=4)
    return figure


def gain_by_depth(results: Results, domains: Sequence[str], big_layers: int) -> Figure:
    """Draw the ceiling's gain against the last layer that its predictor sees, at one budget."""
    figure, panels = style.domain_panels(domains, 3.6, "last layer whose states are seen", _GAIN_LABEL)
    for domain, axes in panels.items():
        rows = [row for row in results.ceiling if (row.domain, row.big_layers) == (domain, big_layers)]
        for spend, look in _BY_SPEND.items():
            _draw_depths(axes, [row for row in rows if row.spend == spend], look)
        axes.axhline(0, color=style.GREY, linestyle=":", linewidth=1.2, label="static")
        axes.set_title(f"{domain}, k = {big_layers}")
    style.legend_below(figure, axes)
    return figure


def _draw_line(axes: Axes, at: Sequence[int], gains: Sequence[Estimate], look: Look) -> None:
    style.draw_band(axes, at, gains, look.colour)
    axes.plot(at, [gain.value for gain in gains], color=look.colour, marker=look.marker, label=look.label)


def _draw_depths(axes: Axes, rows: Sequence[CeilingRow], look: Look) -> None:
    fitted = [row for row in rows if not row.shuffled]
    _draw_line(axes, [row.depth for row in fitted], [row.gain for row in fitted], look)
    for row in rows:
        if row.shuffled:
            label = f"shuffled, {look.label}"
            error = style.errors([row.gain])
            axes.errorbar(row.depth, row.gain.value, error, color=look.colour, fmt="x", capsize=3, label=label)
