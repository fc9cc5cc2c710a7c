"""Figures over depth: the share of big (paper, figure 2), with position (figure 3), and agreement with the oracle."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import ceil
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from duollm.analysis.results import LayerUseRow, Results
from duollm.records.bootstrap import Estimate
from duollm.records.keys import ORACLE
from duollm.report.chart import Chart, Panel, Point, Series, level, lines
from duollm.report.style import DEPARTURE_COLOURS, GREY, Look, policy_look, router_looks

_MOST_BUDGETS = 3
_LAYER = "layer (0 is the first)"
_DOTS = "A dot: even use lies in the 95 % interval over documents."


def share_over_depth(results: Results, budgets: Sequence[int], routers: Sequence[str]) -> Chart:
    """Return the share of big per layer, of the oracle and some routers, one row per domain and one column per k.

    Args:
        routers: the routers to show, see `PolicyRow.variant`.
    """
    looks = {ORACLE: policy_look(ORACLE), **router_looks(results.layer_use)}

    def panel(domain: str, k: int) -> Panel:
        rows = {policy: _find(results, domain, policy, k) for policy in (ORACLE, *routers)}
        series = [_by_layer(looks[policy], row.share_by_layer) for policy, row in rows.items() if row]
        even = level("even use, k / L", k / results.num_layers)
        # Markers at 0 and 1 stay whole.
        return Panel(f"{domain}, k = {k}", _LAYER, "share of big", [even, *series], y_range=(-0.04, 1.04))

    grid = [[panel(domain, k) for k in budgets] for domain in results.domains]
    return Chart(grid, 3.7, 3.0, columns=2 + len(routers))


def _by_layer(look: Look, shares: Sequence[Estimate]) -> Series:
    return lines(look, [Point.of(layer, share) for layer, share in enumerate(shares)])


def share_over_depth_and_position(results: Results, budgets: Sequence[int], routers: Sequence[str]) -> Chart:
    """Return layer x position maps of the share of big minus k / L, one row per domain and policy.

    A dot marks a cell whose 95 % interval over documents has even use in it.
    """
    scale = _colour_scale(results, budgets)

    def panel(domain: str, policy: str, k: int) -> Panel:
        found, name = _find(results, domain, policy, k), policy if policy == ORACLE else f"{policy} router"
        series, edges = [], []
        if found is not None:
            edges, even = found.position_edges, k / results.num_layers
            for layer, share_P in enumerate(found.share_by_layer_and_position):
                look = Look(f"layer {layer}, share of big minus k / L", GREY, "")
                points = [
                    Point(x, share.value - even, share.low - even, share.high - even)
                    for x, share in zip(edges, share_P, strict=False)
                ]
                series.append(Series(look, points))
        draw = partial(_draw_map, edges=edges, scale=scale)
        return Panel(f"{domain}, {name}, k = {k}", "position in the window", "layer", series, draw)

    def finish(figure: Figure, everything: list[Axes]) -> None:
        mappable = ScalarMappable(scale, DEPARTURE_COLOURS)
        figure.colorbar(mappable, ax=everything, label="share of big minus k / L", shrink=0.5, aspect=30)

    grid = [[panel(domain, policy, k) for k in budgets] for domain in results.domains for policy in (ORACLE, *routers)]
    return Chart(grid, 4.1, 2.1, columns=0, intervals=_DOTS, finish=finish)


def _draw_map(axes: Axes, panel: Panel, edges: Sequence[float], scale: Normalize) -> None:
    axes.grid(False)
    if not panel.series:
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", color=GREY, transform=axes.transAxes)
        axes.set(xticks=[], yticks=[])
        return
    values_LP = np.array([[point.y for point in series.points] for series in panel.series])
    look: dict[str, Any] = {"norm": scale, "cmap": DEPARTURE_COLOURS, "rasterized": True}
    axes.pcolormesh(edges, np.arange(len(values_LP) + 1) - 0.5, values_LP, **look)
    middle_P = (np.array(edges[:-1]) + edges[1:]) / 2
    even = [
        (middle, layer)
        for layer, series in enumerate(panel.series)
        for middle, point in zip(middle_P, series.points, strict=True)
        if point.low <= 0 <= point.high
    ]
    axes.plot(*np.reshape(even, (-1, 2)).T, ".", color=GREY, markersize=3)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def agreement_over_depth(results: Results, domain: str, routers: Sequence[str]) -> Chart:
    """Return the share of tokens on the oracle's branch per layer, with that of chance dotted, at up to three k."""
    rows = [row for row in results.agreement if row.domain == domain]
    budgets, looks = sorted({row.big_layers for row in rows}), router_looks(results.comparison)
    places = np.linspace(0, len(budgets) - 1, min(_MOST_BUDGETS, len(budgets))).round().astype(int)
    panels = []
    for k in [budgets[place] for place in places]:
        series = []
        for row in rows:
            if row.big_layers == k and row.variant in routers:
                look = looks[row.variant]
                chance = replace(look, label=f"{look.label}, by chance", marker="", line=":")
                points = [Point(layer, share) for layer, share in enumerate(row.share_if_independent_by_layer)]
                series += [_by_layer(look, row.share_by_layer), lines(chance, points)]
        panels.append(Panel(f"{domain}, k = {k}", _LAYER, "on the oracle's branch", series, percent=True))
    return Chart([panels], 3.9, 3.3, columns=2)


def _find(results: Results, domain: str, policy: str, k: int) -> LayerUseRow | None:
    """Return the layer use of a policy or router (see `PolicyRow.variant`), or None if it was not measured."""
    found = (row for row in results.layer_use if (row.domain, row.variant, row.big_layers) == (domain, policy, k))
    return next(found, None)


def _colour_scale(results: Results, budgets: Sequence[int]) -> Normalize:
    """Return one scale for all maps, symmetric about even use, its ends on a multiple of 0.1."""
    departures = [
        abs(share.value - row.big_layers / results.num_layers)
        for row in results.layer_use
        if row.big_layers in budgets
        for share_P in row.share_by_layer_and_position
        for share in share_P
    ]
    end = ceil(10 * max(departures, default=0.1)) / 10
    return Normalize(-end, end)
