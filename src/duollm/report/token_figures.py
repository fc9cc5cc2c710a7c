"""Figures of single tokens: difficulty against loss (paper, figure 5) and routes of a text (figure 7)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from duollm.analysis.difficulty import HIGH_LOSS_QUANTILE, difficulty
from duollm.analysis.results import Results
from duollm.models.branch import Branch
from duollm.records.bootstrap import Integers
from duollm.records.numbers import percent, with_interval
from duollm.records.tokens import Tokens
from duollm.report.style import panels

EXTREME_SHARE = 0.01
"""Share of tokens, those of highest and of lowest gain, left outside the figure of difficulty."""
_COUNT_COLOURS = LinearSegmentedColormap.from_list("counts", ["#bcd9ea", "#0b4f7d", "#04192b"])
_BRANCH_COLOURS = {Branch.SKIP: "#ffffff", Branch.SMALL: "#cfe3f1", Branch.BIG: "#0b4f7d"}


def difficulty_by_loss(domains: Sequence[Tokens], results: Results, big_layers: int) -> Figure:
    """Draw the gain of the oracle at one budget against the loss under all small, one panel per domain."""
    figure, [line] = panels(1, len(domains), 5.4, 4.2)
    for axes, tokens in zip(line, domains, strict=True):
        nll_small_T, gain_T = difficulty(tokens, big_layers)
        # A few extreme gains would flatten all others.
        bottom, top = np.quantile(gain_T, [EXTREME_SHARE / 2, 1 - EXTREME_SHARE / 2])
        frame = float(nll_small_T.min()), float(nll_small_T.max()), float(bottom), float(top)
        look: dict[str, Any] = {"gridsize": 45, "bins": "log", "cmap": _COUNT_COLOURS, "mincnt": 1, "rasterized": True}
        shown = axes.hexbin(nll_small_T, gain_T, extent=frame, **look)
        axes.axvline(np.quantile(nll_small_T, HIGH_LOSS_QUANTILE), color="#D55E00", linestyle="--", linewidth=1.3)
        axes.axhline(np.median(gain_T), color="#D55E00", linestyle=":", linewidth=1.3)
        axes.set(title=f"{tokens.domain}, k = {big_layers}", ylabel="gain of the oracle (nats)")
        for row in results.difficulty:
            if (row.domain, row.big_layers) == (tokens.domain, big_layers):
                share = with_interval(row.hard_without_gain, percent)
                summary = f"{share} of the high-loss tokens gain less than the median"
                axes.set_xlabel(f"nll under all small (nats)\n{summary}")
        figure.colorbar(shown, ax=axes, label="tokens", format="%g")
    return figure


def route_strips(strips: Sequence[tuple[str, Integers, list[str]]]) -> Figure:
    """Draw layer x token grids of branches, one above the other.

    Args:
        strips: for each strip a title, the routes [T, L] of a policy on consecutive tokens of a text, and the tokens.
    """
    longest = max(len(words) for *_, words in strips)
    figure, grid = panels(len(strips), 1, 0.17 * longest + 0.8, 2.6)
    used = sorted({int(branch) for _, routes_TL, _ in strips for branch in np.unique(routes_TL)})
    for strip, [axes] in zip(strips, grid, strict=True):
        _draw_strip(axes, *strip)
    patches = [
        Patch(facecolor=_BRANCH_COLOURS[Branch(b)], edgecolor="#999999", label=Branch(b).name.lower()) for b in used
    ]
    figure.legend(handles=patches, loc="outside upper right", ncols=len(patches))
    return figure


def _draw_strip(axes: Axes, title: str, routes_TL: Integers, words: list[str]) -> None:
    colours = ListedColormap([_BRANCH_COLOURS[branch] for branch in Branch])
    bounds = BoundaryNorm(np.arange(len(Branch) + 1) - 0.5, len(Branch))
    axes.pcolormesh(routes_TL.T, cmap=colours, norm=bounds, edgecolors="white", linewidth=0.6, rasterized=True)
    axes.set_title(title)
    axes.set_ylabel("layer")
    axes.grid(False)
    axes.set_xticks(np.arange(len(words)) + 0.5, words, rotation=90, fontsize=8, parse_math=False)
    layers = routes_TL.shape[1]
    axes.set_yticks([0.5, layers - 0.5], ["0", str(layers - 1)])
