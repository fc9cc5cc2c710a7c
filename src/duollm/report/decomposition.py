"""The predictable ceiling on the page: the parts of the oracle's gain, and what can be predicted from which layer."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from duollm.analysis.numbers import with_interval
from duollm.analysis.policies import EXACT
from duollm.analysis.statistics import Estimate
from duollm.report.style import GREY, Look, Row, estimate, legend_below, of_first_context, panels

_PARTS = {
    "predictable": Look("predictable here", "#009E73", "s"),
    "noise": Look("selection noise", "#D55E00", "D"),
    "rest": Look("rest", "#8c8c8c", "x"),
}
_TOTAL = Look("oracle's gain over static", "#0072B2", "o")
_BAR = 0.25
_BY_SPEND = {"average": Look("k on average", "#0072B2", "o"), EXACT: Look("k on every token", "#009E73", "s")}


def shown_decomposition(results: dict[str, Any]) -> list[Row]:
    """Return the rows of the first context in which the gain was taken apart: the main one where it was."""
    return of_first_context(results["decomposition"])


def ceiling_budget(results: dict[str, Any], wanted: int) -> int:
    """Return the budget nearest to `wanted` at which the ceiling was measured; `wanted` if it was not."""
    measured = sorted({row["big_layers"] for row in results["ceiling"]})
    return min(measured, key=lambda k: abs(k - wanted), default=wanted)


def parts_by_budget(results: dict[str, Any], domains: Sequence[str]) -> Figure:
    """Draw the parts of the oracle's gain against the budget: a panel per domain."""
    figure, [row] = panels(1, len(domains), 5.4, 4.0)
    for axes, domain in zip(row, domains, strict=True):
        _draw_parts(axes, [one for one in shown_decomposition(results) if one["domain"] == domain])
        axes.set(title=domain, xlabel="big layers per token", ylabel="gain over static (nats per token)")
    legend_below(figure, row[0], columns=4)
    return figure


def gain_by_depth(results: dict[str, Any], domains: Sequence[str], big_layers: int) -> Figure:
    """Draw what the ceiling gains against the last layer that its predictor sees, at one budget."""
    figure, [row] = panels(1, len(domains), 5.4, 3.6)
    for axes, domain in zip(row, domains, strict=True):
        rows = [one for one in results["ceiling"] if (one["domain"], one["big_layers"]) == (domain, big_layers)]
        for spend, look in _BY_SPEND.items():
            _draw_depths(axes, [one for one in rows if one["spend"] == spend], look)
        axes.axhline(0, color=GREY, linestyle=":", linewidth=1.2, label="static")
        axes.set(title=f"{domain}, k = {big_layers}", xlabel="last layer whose states are seen")
        axes.set_ylabel("gain over static (nats per token)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_below(figure, row[0])
    return figure


def _draw_parts(axes: Axes, rows: list[Row]) -> None:
    axes.axhline(0, color=GREY, linewidth=1)
    for place, (quantity, look) in enumerate(_PARTS.items()):
        at = [row["big_layers"] + (place - 1) * _BAR for row in rows]
        height = [row[quantity] for row in rows]
        axes.bar(at, height, _BAR, color=look.colour, yerr=_errors(rows, quantity), capsize=2, label=look.label)
    total, budgets = [row["total"] for row in rows], [row["big_layers"] for row in rows]
    axes.errorbar(
        budgets, total, _errors(rows, "total"), color=_TOTAL.colour, fmt=_TOTAL.marker, capsize=3, label=_TOTAL.label
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _errors(rows: list[Row], quantity: str) -> list[list[float]]:
    """Return how far the intervals reach below and above the values."""
    below = [row[quantity] - row[f"{quantity}_low"] for row in rows]
    return [below, [row[f"{quantity}_high"] - row[quantity] for row in rows]]


def _draw_depths(axes: Axes, rows: list[Row], look: Look) -> None:
    fitted = [row for row in rows if not row["shuffled"]]
    depths = [row["depth"] for row in fitted]
    axes.fill_between(
        depths,
        [row["low"] for row in fitted],
        [row["high"] for row in fitted],
        color=look.colour,
        alpha=0.18,
        linewidth=0,
    )
    axes.plot(depths, [row["gain"] for row in fitted], color=look.colour, marker=look.marker, label=look.label)
    for row in rows:
        if row["shuffled"]:
            error = [[row["gain"] - row["low"]], [row["high"] - row["gain"]]]
            label = f"shuffled, {look.label}"
            axes.errorbar(row["depth"], row["gain"], error, color=look.colour, fmt="x", capsize=3, label=label)


def decomposition_sentences(results: dict[str, Any], domain: str, big_layers: int) -> str | None:
    """Say what the oracle's gain is made of at one budget, or return None if that was not measured."""
    for row in shown_decomposition(results):
        if (row["domain"], row["big_layers"]) == (domain, big_layers):
            total, noise = (with_interval(estimate(row, quantity)) for quantity in ("total", "noise"))
            return (
                f"Of the oracle's gain over static at k = {big_layers}, {total} nats, an offline predictor without the "
                f"label {_reached(estimate(row, 'predictable'))}; a peek at a drawn label alone buys {noise}. "
                f"{_left(estimate(row, 'rest'))} {_control(estimate(row, 'shuffled'))}"
            )
    return None


def _reached(predictable: Estimate) -> str:
    if predictable.low > 0:
        return f"reaches {with_interval(predictable)}"
    if predictable.high < 0:
        return f"reaches nothing: it is {with_interval(-predictable)} worse than static"
    return f"reaches {with_interval(predictable)}, which shows no gain"


def _left(rest: Estimate) -> str:
    if rest.low > 0:
        return f"That leaves {with_interval(rest)} unexplained."
    if rest.high < 0:
        return f"The two together exceed it by {with_interval(-rest)}, so none of it is left unexplained."
    return f"What they leave, {with_interval(rest)}, does not differ from nothing."


def _control(shuffled: Estimate) -> str:
    if shuffled.low > 0:
        return (
            f"But the control, fitted to gains of other tokens, gains {with_interval(shuffled)} as well: "
            "that much is a better fixed pattern, not a prediction."
        )
    return f"The control, fitted to gains of other tokens, shows no gain: {with_interval(shuffled)}."
