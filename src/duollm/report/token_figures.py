"""Figures of single tokens: difficulty against loss (paper, figure 5) and routes of a text (figure 7)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from duollm.analysis.difficulty import HIGH_LOSS_QUANTILE, difficulty
from duollm.analysis.statistics import Floats, Integers
from duollm.analysis.tables import OracleTable
from duollm.models.branch import Branch
from duollm.report.style import panels

EXTREME_SHARE = 0.01
"""Share of tokens, those of highest and of lowest gain, left outside the figure of difficulty."""
_COUNT_COLOURS = LinearSegmentedColormap.from_list("counts", ["#bcd9ea", "#0b4f7d", "#04192b"])
_BRANCH_COLOURS = {Branch.SKIP: "#ffffff", Branch.SMALL: "#cfe3f1", Branch.BIG: "#0b4f7d"}


@dataclass(frozen=True)
class RouteStrip:
    """The routes that one policy took on consecutive tokens of a text."""

    title: str
    routes_TL: Integers
    words: list[str]


def difficulty_by_loss(oracles: Sequence[OracleTable], results: dict[str, Any], big_layers: int) -> Figure:
    """Draw the gain of the oracle at one budget against the loss under all small, a panel per domain."""
    figure, [row] = panels(1, len(oracles), 5.4, 4.2)
    for axes, oracle in zip(row, oracles, strict=True):
        gain_T = difficulty(oracle.nll_small_T, oracle.nll_oracle_T[big_layers])
        shown = axes.hexbin(
            oracle.nll_small_T,
            gain_T,
            gridsize=45,
            extent=_frame(oracle.nll_small_T, gain_T),
            bins="log",
            cmap=_COUNT_COLOURS,
            mincnt=1,
            rasterized=True,
        )
        _mark_thresholds(axes, float(np.quantile(oracle.nll_small_T, HIGH_LOSS_QUANTILE)), float(np.median(gain_T)))
        axes.set(
            title=f"{oracle.domain}, k = {big_layers}",
            xlabel=f"nll under all small (nats)\n{_summary(results, oracle.domain, big_layers)}",
            ylabel="gain of the oracle (nats)",
        )
        figure.colorbar(shown, ax=axes, label="tokens", format="%g")
    return figure


def route_strips(strips: Sequence[RouteStrip]) -> Figure:
    """Draw layer x token grids of branches, one above the other."""
    longest = max(len(strip.words) for strip in strips)
    figure, grid = panels(len(strips), 1, 0.17 * longest + 0.8, 2.6)
    used = sorted({int(branch) for strip in strips for branch in np.unique(strip.routes_TL)})
    for strip, [axes] in zip(strips, grid, strict=True):
        _draw_strip(axes, strip)
    patches = [
        Patch(facecolor=_BRANCH_COLOURS[Branch(b)], edgecolor="#999999", label=Branch(b).name.lower()) for b in used
    ]
    figure.legend(handles=patches, loc="outside upper right", ncols=len(patches))
    return figure


def _frame(nll_T: Floats, gain_T: Floats) -> tuple[float, float, float, float]:
    """Return the limits (left, right, bottom, top) of what is drawn: few extreme gains would flatten all others."""
    bottom, top = np.quantile(gain_T, [EXTREME_SHARE / 2, 1 - EXTREME_SHARE / 2])
    return float(nll_T.min()), float(nll_T.max()), float(bottom), float(top)


def _mark_thresholds(axes: Axes, high_loss: float, median_gain: float) -> None:
    axes.axvline(high_loss, color="#D55E00", linestyle="--", linewidth=1.3)
    axes.axhline(median_gain, color="#D55E00", linestyle=":", linewidth=1.3)


def _summary(results: dict[str, Any], domain: str, k: int) -> str:
    for row in results["difficulty"]:
        if row["domain"] == domain and row["big_layers"] == k:
            share = f"{row['hard_without_gain']:.0%} [{row['low']:.0%}, {row['high']:.0%}]"
            return f"{share} of the high-loss tokens gain less than the median"
    return ""


def _draw_strip(axes: Axes, strip: RouteStrip) -> None:
    colours = ListedColormap([_BRANCH_COLOURS[branch] for branch in Branch])
    bounds = BoundaryNorm(np.arange(len(Branch) + 1) - 0.5, len(Branch))
    axes.pcolormesh(strip.routes_TL.T, cmap=colours, norm=bounds, edgecolors="white", linewidth=0.6)
    axes.set_title(strip.title)
    axes.set_ylabel("layer")
    axes.grid(False)
    axes.set_xticks(np.arange(len(strip.words)) + 0.5, strip.words, rotation=90, fontsize=8, parse_math=False)
    layers = strip.routes_TL.shape[1]
    axes.set_yticks([0.5, layers - 0.5], ["0", str(layers - 1)])
