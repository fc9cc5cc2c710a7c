"""Figures over depth: the share of big (paper, figure 2), with position (figure 3), and agreement with the oracle."""

from collections.abc import Sequence
from math import ceil
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from duollm.analysis.results import LayerUseRow, Results
from duollm.records.keys import ORACLE
from duollm.report import style

_MOST_BUDGETS = 3


def share_over_depth(results: Results, budgets: Sequence[int], routers: Sequence[str]) -> Figure:
    """Draw the share of big per layer, of the oracle and some routers, one row per domain and one column per k.

    Args:
        routers: the routers to show, see `PolicyRow.variant`.
    """
    layers = np.arange(results.num_layers)
    looks = {ORACLE: style.policy_look(ORACLE), **style.router_looks(results.layer_use)}
    figure, grid = style.panels(len(results.domains), len(budgets), 3.7, 2.7)
    for domain, line in zip(results.domains, grid, strict=True):
        for k, axes in zip(budgets, line, strict=True):
            axes.axhline(k / len(layers), color=style.GREY, linestyle=":", linewidth=1.2, label="even use, k / L")
            for policy in (ORACLE, *routers):
                if found := _find(results, domain, policy, k):
                    style.draw_band(axes, layers, found.share_by_layer, looks[policy].colour, alpha=0.2)
                    axes.plot(layers, [share.value for share in found.share_by_layer], **looks[policy].style)
            axes.set(title=f"{domain}, k = {k}", xlabel="layer (0 is the first)", ylabel="share of big")
            axes.set_ylim(-0.04, 1.04)  # markers at 0 and 1 stay whole
            style.whole_numbers(axes)
    style.legend_below(figure, grid[0][0], columns=2 + len(routers))
    return figure


def share_over_depth_and_position(results: Results, budgets: Sequence[int], routers: Sequence[str]) -> Figure:
    """Draw layer x position maps of the share of big minus k / L, one row per domain and policy."""
    lines = [(domain, policy) for domain in results.domains for policy in (ORACLE, *routers)]
    scale = _colour_scale(results, budgets)
    figure, grid = style.panels(len(lines), len(budgets), 3.7, 2.1)
    for (domain, policy), line in zip(lines, grid, strict=True):
        title = policy if policy == ORACLE else f"router ({policy})"
        for k, axes in zip(budgets, line, strict=True):
            found = _find(results, domain, policy, k)
            axes.set(title=f"{domain}, {title}, k = {k}", xlabel="position in the window", ylabel="layer")
            if found is None:
                axes.text(
                    0.5, 0.5, "not measured", ha="center", va="center", color=style.GREY, transform=axes.transAxes
                )
                axes.set(xticks=[], yticks=[])
            else:
                _draw_map(axes, found, k / results.num_layers, scale)
    everything = [axes for line in grid for axes in line]
    mappable = ScalarMappable(scale, style.DEPARTURE_COLOURS)
    figure.colorbar(mappable, ax=everything, label="share of big minus k / L", shrink=0.5, aspect=30)
    return figure


def agreement_over_depth(results: Results, domain: str, routers: Sequence[str]) -> Figure:
    """Draw the share of tokens on the oracle's branch per layer, with that of chance dotted, at up to three k."""
    rows = [row for row in results.agreement if row.domain == domain]
    budgets, looks = sorted({row.big_layers for row in rows}), style.router_looks(results.comparison)
    places = np.linspace(0, len(budgets) - 1, min(_MOST_BUDGETS, len(budgets))).round().astype(int)
    figure, [line] = style.panels(1, len(places), 3.9, 3.3)
    for axes, place in zip(line, places, strict=True):
        for row in rows:
            if row.big_layers == budgets[place] and row.variant in routers:
                look, layers = looks[row.variant], np.arange(len(row.share_by_layer))
                style.draw_band(axes, layers, row.share_by_layer, look.colour, alpha=0.2)
                axes.plot(layers, [share.value for share in row.share_by_layer], **look.style)
                chance = row.share_if_independent_by_layer
                axes.plot(layers, chance, color=look.colour, linestyle=":", linewidth=1.3)
        title = f"{domain}, k = {budgets[place]}"
        axes.set(title=title, xlabel="layer (0 is the first)", ylabel="on the oracle's branch")
        style.whole_numbers(axes)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    line[0].plot([], [], color=style.GREY, linestyle=":", label="by chance, with the same shares per layer")
    style.legend_below(figure, line[0], columns=2)
    return figure


def _find(results: Results, domain: str, policy: str, k: int) -> LayerUseRow | None:
    """Return the layer use of a policy or router (see `PolicyRow.variant`), or None if it was not measured."""
    found = (row for row in results.layer_use if (row.domain, row.variant, row.big_layers) == (domain, policy, k))
    return next(found, None)


def _draw_map(axes: Axes, row: LayerUseRow, even: float, scale: Normalize) -> None:
    share_LP = np.array(row.share_by_layer_and_position)
    layer_edges = np.arange(len(share_LP) + 1) - 0.5
    look: dict[str, Any] = {"norm": scale, "cmap": style.DEPARTURE_COLOURS, "rasterized": True}
    axes.pcolormesh(row.position_edges, layer_edges, share_LP - even, **look)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(False)


def _colour_scale(results: Results, budgets: Sequence[int]) -> Normalize:
    """Return one scale for all maps, symmetric about even use, its ends on a multiple of 0.1."""
    departures = [
        np.abs(np.array(row.share_by_layer_and_position) - row.big_layers / results.num_layers).max()
        for row in results.layer_use
        if row.big_layers in budgets
    ]
    end = ceil(10 * max(departures, default=0.1)) / 10
    return Normalize(-end, end)
