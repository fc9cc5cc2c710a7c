"""Selection noise on the page: a figure over all budgets, and one sentence at one budget."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from duollm.analysis.numbers import with_interval
from duollm.analysis.statistics import Estimate
from duollm.report.style import GREY, Look, Row, estimate, legend_below, of_first_context, panels

_LOOKS = {
    "gain": Look("oracle, true labels", "#0072B2", "o"),
    "gain_drawn": Look("the same search, drawn labels", "#D55E00", "D"),
    "second_draw": Look("the picks of drawn labels on a second draw", "#882255", "v"),
}


def shown_noise(results: dict[str, Any]) -> list[Row]:
    """Return the rows of the first context in which selection noise was measured: the main one where it was."""
    return of_first_context(results["selection_noise"])


def gains_by_budget(results: dict[str, Any], domains: Sequence[str]) -> Figure:
    """Draw the gains over static, with true and with drawn labels, against the budget: a panel per domain."""
    figure, [row] = panels(1, len(domains), 5.4, 4.0)
    for axes, domain in zip(row, domains, strict=True):
        _draw_gains(axes, [one for one in shown_noise(results) if one["domain"] == domain])
        axes.set(title=domain, xlabel="big layers per token", ylabel="gain over static (nats per token)")
    legend_below(figure, row[0], columns=2)
    return figure


def _draw_gains(axes: Axes, rows: list[Row]) -> None:
    axes.axhline(0, color=GREY, linestyle=":", linewidth=1.2, label="static")
    budgets = [row["big_layers"] for row in rows]
    for quantity, look in _LOOKS.items():
        low, high = ([row[f"{quantity}_{end}"] for row in rows] for end in ("low", "high"))
        axes.fill_between(budgets, low, high, color=look.colour, alpha=0.18, linewidth=0)
        gain = [row[quantity] for row in rows]
        axes.plot(budgets, gain, color=look.colour, marker=look.marker, label=look.label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def noise_sentences(results: dict[str, Any], domain: str, big_layers: int) -> str | None:
    """Say what the oracle's gain is worth at one budget, or return None if that was not measured."""
    for row in shown_noise(results):
        if (row["domain"], row["big_layers"]) == (domain, big_layers):
            gain, drawn = (with_interval(estimate(row, quantity)) for quantity in ("gain", "gain_drawn"))
            return (
                f"At k = {big_layers} the oracle gains {gain} nats over static with the true labels. The same search "
                f"with labels drawn at random from the all-big prediction gains {drawn}, and on a second draw its "
                f"picks {_worth(estimate(row, 'second_draw'))}. {_beyond(estimate(row, 'gain_beyond_drawn'))}"
            )
    return None


def _worth(second_draw: Estimate) -> str:
    if second_draw.low > 0:
        return f"are {with_interval(second_draw)} better than static"
    if second_draw.high < 0:
        return f"are {with_interval(-second_draw)} worse than static"
    return f"differ from static by {with_interval(second_draw)}, which shows neither gain nor loss"


def _beyond(difference: Estimate) -> str:
    if difference.low > 0:
        return f"A true label thus buys {with_interval(difference)} more than a drawn one."
    if difference.high < 0:
        return f"A true label thus buys {with_interval(-difference)} less than a drawn one."
    return f"The two gains differ by {with_interval(difference)}: no difference is shown."
