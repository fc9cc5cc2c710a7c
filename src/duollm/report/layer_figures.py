"""Figures of layer use: the share of big over depth, and over depth and position (paper, figures 2 and 3)."""

from collections.abc import Sequence
from math import ceil
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from duollm.analysis.policies import ORACLE, variant
from duollm.report.style import DEPARTURE_COLOURS, GREY, Look, Row, legend_below, panels, policy_look, router_looks


def share_over_depth(results: dict[str, Any], budgets: Sequence[int], routers: Sequence[str]) -> Figure:
    """Draw the share of big per layer with intervals, of the oracle and some routers: a row per domain, a column per k.

    Args:
        routers: which are shown, see `variant`.
    """
    domains = list(results["data"])
    figure, grid = panels(len(domains), len(budgets), 3.7, 2.7)
    for domain, row in zip(domains, grid, strict=True):
        for k, axes in zip(budgets, row, strict=True):
            _draw_profile(axes, results, domain, k, [ORACLE, *routers])
            axes.set(title=f"{domain}, k = {k}", xlabel="layer (0 is the first)", ylabel="share of big")
            axes.set_ylim(-0.04, 1.04)  # markers at 0 and 1 stay whole
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_below(figure, grid[0][0], columns=2 + len(routers))
    return figure


def share_over_depth_and_position(results: dict[str, Any], budgets: Sequence[int], routers: Sequence[str]) -> Figure:
    """Draw layer x position maps of the share of big above k / L: a row per domain and policy."""
    lines = [(domain, policy) for domain in results["data"] for policy in (ORACLE, *routers)]
    titles = {ORACLE: ORACLE, **{name: f"router ({name})" for name in routers}}
    scale = _colour_scale(results, budgets)
    figure, grid = panels(len(lines), len(budgets), 3.7, 2.1)
    for (domain, policy), row in zip(lines, grid, strict=True):
        for k, axes in zip(budgets, row, strict=True):
            found = _find(results, domain, policy, k)
            axes.set(title=f"{domain}, {titles[policy]}, k = {k}", xlabel="position in the window", ylabel="layer")
            if found is None:
                _say_not_measured(axes)
            else:
                _draw_map(axes, found, k / results["model"]["num_layers"], scale)
    everything = [axes for row in grid for axes in row]
    mappable = ScalarMappable(scale, DEPARTURE_COLOURS)
    figure.colorbar(mappable, ax=everything, label="share of big minus k / L", shrink=0.5, aspect=30)
    return figure


def _find(results: dict[str, Any], domain: str, policy: str, k: int) -> Row | None:
    """Return the layer use of a policy or router (see `variant`), or None if it was not measured."""
    for row in results["layer_use"]:
        if row["domain"] == domain and variant(row) == policy and row["big_layers"] == k:
            return dict(row)
    return None


def _draw_profile(axes: Axes, results: dict[str, Any], domain: str, k: int, policies: Sequence[str]) -> None:
    layers = np.arange(results["model"]["num_layers"])
    axes.axhline(k / len(layers), color=GREY, linestyle=":", linewidth=1.2, label="even use, k / L")
    looks: dict[str, Look] = {ORACLE: policy_look(ORACLE), **router_looks(results["layer_use"])}
    for policy in policies:
        found, look = _find(results, domain, policy, k), looks[policy]
        if found:
            axes.fill_between(layers, found["low"], found["high"], color=look.colour, alpha=0.2, linewidth=0)
            axes.plot(layers, found["share_by_layer"], **look.style)


def _draw_map(axes: Axes, row: Row, even: float, scale: Normalize) -> None:
    share_LP = np.array(row["share_by_layer_and_position"])
    layer_edges = np.arange(len(share_LP) + 1) - 0.5
    axes.pcolormesh(row["position_edges"], layer_edges, share_LP - even, norm=scale, cmap=DEPARTURE_COLOURS)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(False)


def _say_not_measured(axes: Axes) -> None:
    axes.text(0.5, 0.5, "not measured", ha="center", va="center", color=GREY, transform=axes.transAxes)
    axes.set(xticks=[], yticks=[])


def _colour_scale(results: dict[str, Any], budgets: Sequence[int]) -> Normalize:
    """Return one scale for all maps, symmetric about even use, its ends on a multiple of 0.1."""
    layers = results["model"]["num_layers"]
    departures = [
        np.abs(np.array(row["share_by_layer_and_position"]) - row["big_layers"] / layers).max()
        for row in results["layer_use"]
        if row["big_layers"] in budgets
    ]
    end = ceil(10 * max(departures, default=0.1)) / 10
    return Normalize(-end, end)
