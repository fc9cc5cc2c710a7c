"""A figure as a table: series of points by panel, from which both its picture and its CSV are made."""

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import isfinite, nan
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from duollm.files import replacing
from duollm.records.bootstrap import Estimate
from duollm.report.style import GREY, Look

COLUMNS = ("panel", "x axis", "y axis", "series", "x", "y", "low", "high", "note")
OVER_DOCUMENTS = "Bands and whiskers: 95 % intervals over documents"
_BAR = 0.25
_FIRST_WHISKER, _NEXT_WHISKER = 0.6, 0.05
"""Where the whiskers of levels stand, as shares of the panel's width."""
_LETTERS_PER_INCH = 15


class Point(NamedTuple):
    """A value with its interval, and perhaps a word about it; nan where there is none. A level has no x."""

    x: float
    y: float
    low: float = nan
    high: float = nan
    note: str = ""

    @classmethod
    def of(cls, x: float, estimate: Estimate) -> "Point":
        """Put an estimate at x."""
        return cls(x, estimate.value, estimate.low, estimate.high)


@dataclass(frozen=True)
class Series:
    """Points that are drawn alike: as a line with a band, a level, single points with whiskers, or bars."""

    look: Look
    points: Sequence[Point]
    form: str = "line"


@dataclass(frozen=True)
class Panel:
    """One plot.

    Attributes:
        draw: draws the series on axes.
        ticks: marks of a logarithmic x axis; None for a linear one.
        perplexity: whether a nll has the perplexity, which the paper draws, on an axis at the right.
    """

    title: str
    x: str
    y: str
    series: Sequence[Series]
    draw: "Callable[[Axes, Panel], None]" = field(default_factory=lambda: draw_series)
    ticks: Sequence[int] | None = None
    percent: bool = False
    perplexity: bool = False
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class Chart:
    """A grid of panels, each about `width` x `height` inches.

    Attributes:
        columns: columns of the legend below; 0 for no legend.
        intervals: what bands and whiskers are; empty for a figure without them.
        finish: adds what belongs to the whole figure, such as a scale of colours.
    """

    grid: Sequence[Sequence[Panel]]
    width: float
    height: float
    columns: int = 3
    intervals: str = f"{OVER_DOCUMENTS}."
    finish: Callable[[Figure, list[Axes]], None] | None = None


def lines(look: Look, points: Iterable[Point]) -> Series:
    """Return a line through points in the order of x."""
    return Series(look, sorted(points, key=lambda point: point.x))


def level(label: str, y: float) -> Series:
    """Return a thin line for a value that is no measurement, such as 0."""
    return Series(Look(label, GREY, "", ":"), [Point(nan, y)], "level")


def draw_chart(chart: Chart, note: str = "") -> Figure:
    """Draw a chart; `note` says on top of it what one must know to read it without its page."""
    rows, columns = len(chart.grid), len(chart.grid[0])
    figure = Figure(figsize=(columns * chart.width, rows * chart.height), layout="constrained")
    everything: list[Axes] = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axes, panel in zip(everything, (panel for line in chart.grid for panel in line), strict=True):
        axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
        if panel.ticks:
            axes.set_xscale("log")
            axes.set_xticks(panel.ticks, [str(tick) for tick in panel.ticks])
        panel.draw(axes, panel)
        if panel.percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        if panel.perplexity:
            right = axes.secondary_yaxis("right", functions=(np.exp, _logarithm))
            right.set_ylabel("perplexity")
        if panel.x_range:
            axes.set_xlim(*panel.x_range)
        if panel.y_range:
            axes.set_ylim(*panel.y_range)
    if note:
        wrapped = fill(f"{note} {chart.intervals}", round(columns * chart.width * _LETTERS_PER_INCH))
        figure.suptitle(wrapped, x=0.01, ha="left", fontsize=8.5, color=GREY)
    if chart.columns:
        entries = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in everything]
        named = {label: handle for pairs in entries for handle, label in pairs}
        figure.legend(named.values(), named, loc="outside lower center", ncols=chart.columns)
    if chart.finish:
        chart.finish(figure, everything)
    return figure


def draw_series(axes: Axes, panel: Panel) -> None:
    """Draw lines, levels, points and bars; bars at the same x stand side by side, and so do whiskers of levels."""
    bars = [series for series in panel.series if series.form == "bars"]
    levels = [series for series in panel.series if series.form == "level" and isfinite(series.points[0].low)]
    for series in panel.series:
        look, points, style = series.look, series.points, series.look.style
        x, y = [point.x for point in points], [point.y for point in points]
        known = all(isfinite(point.low) for point in points)
        if series.form == "level":
            axes.axhline(y[0], color=look.colour, linestyle=look.line, linewidth=1.3, label=look.label)
            if known and points[0].low < points[0].high:
                place = _FIRST_WHISKER + _NEXT_WHISKER * levels.index(series)
                across = axes.get_yaxis_transform()
                axes.errorbar([place], y, whiskers(points), capsize=3, color=look.colour, transform=across)
        elif series.form == "points" or len(points) == 1:  # a band at one x would have no width
            axes.errorbar(x, y, whiskers(points) if known else None, capsize=3, **style | {"linestyle": ""})
        elif series.form == "bars":
            places = np.array(x, dtype=float) + (bars.index(series) - (len(bars) - 1) / 2) * _BAR
            axes.bar(places, y, _BAR, color=look.colour, yerr=whiskers(points), capsize=2, label=look.label)
        else:
            if known:
                low, high = [point.low for point in points], [point.high for point in points]
                axes.fill_between(x, low, high, color=look.colour, alpha=0.28, linewidth=0)
            axes.plot(x, y, **style)
    placed = [point.x for series in panel.series for point in series.points if isfinite(point.x)]
    if not panel.ticks and all(x == round(x) for x in placed):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _logarithm(perplexity: Any) -> Any:
    """The inverse of exp, which matplotlib also asks about values that are no perplexities."""
    return np.log(np.maximum(perplexity, 1e-300))


def whiskers(points: Sequence[Point]) -> Any:
    """Return how far the intervals of points reach below and above them, [2, points], as matplotlib wants them."""
    return np.array([[point.y - point.low, point.high - point.y] for point in points]).T


def rows(chart: Chart) -> Iterator[tuple[Any, ...]]:
    """Yield the rows of a chart's CSV, `COLUMNS` first."""
    yield COLUMNS
    for panel in [panel for line in chart.grid for panel in line]:
        for series in panel.series:
            for point in series.points:
                numbers = [f"{value:.6g}" if isfinite(value) else "" for value in point[:4]]
                yield panel.title, panel.x, panel.y, series.look.label, *numbers, point.note


def write_csv(chart: Chart, path: Path) -> None:
    """Write the table behind a chart."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows(chart))
