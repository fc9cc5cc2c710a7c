"""Figures of single tokens: difficulty against loss (paper, figure 5), on a text (6), and routes of a text (7)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from duollm.analysis.difficulty import HIGH_LOSS_QUANTILE, difficulty
from duollm.analysis.results import Results
from duollm.models.branch import Branch
from duollm.records.bootstrap import Floats, Integers, percent, with_interval
from duollm.records.keys import ALL_BIG, ALL_SMALL, ORACLE, Key
from duollm.records.tokens import Tokens
from duollm.report.chart import Chart, Panel, Point, Series, draw_series
from duollm.report.style import GREY, Look, policy_look

EXTREME_SHARE = 0.01
"""Share of tokens, those of highest and of lowest gain, left outside the figure of difficulty."""
_HIGH_LOSS = f"right of this line: the {1 - HIGH_LOSS_QUANTILE:.0%} of tokens with the highest loss"
_COUNT_COLOURS = LinearSegmentedColormap.from_list("counts", ["#bcd9ea", "#0b4f7d", "#04192b"])
_BRANCH_COLOURS = {Branch.SKIP: "#ffffff", Branch.SMALL: "#cfe3f1", Branch.BIG: "#0b4f7d"}


def difficulty_by_loss(domains: Sequence[Tokens], results: Results, big_layers: int) -> Chart:
    """Return the gains of all big and of the oracle against the loss of the cheapest policy, one column per domain."""

    def panel(tokens: Tokens, gain_T: Floats, title: str, label: str) -> Panel:
        points = [Point(x, y) for x, y in zip(nll_T.tolist(), gain_T.tolist(), strict=True)]
        series = Series(Look("token", GREY, ""), points)
        return Panel(title, label, f"gain over {results.cheapest} (nats)", [series], _draw_counts)

    above, below = [], []
    for tokens in domains:
        nll_T, gain_T = difficulty(tokens, big_layers)
        all_big = tokens.policies[Key(ALL_BIG, tokens.space.num_layers)]
        label = f"nll under {results.cheapest} (nats)"
        above.append(panel(tokens, nll_T - all_big.nll_T, f"{tokens.domain}, all big", label))
        for row in results.difficulty:
            if (row.domain, row.big_layers) == (tokens.domain, big_layers):
                share = with_interval(row.hard_without_gain, percent)
                label += f"\n{share} of the high-loss tokens\ngain less than the median"
        below.append(panel(tokens, gain_T, f"{tokens.domain}, oracle, k = {big_layers}", label))
    return Chart([above, below], 5.4, 3.6, columns=2, intervals="")


def losses_of_text(tokens: Tokens, rows: Sequence[int], words: Sequence[str], big_layers: int, cheapest: str) -> Chart:
    """Return, token by token of a text, the loss of the cheapest policy, of all big and of the oracle.

    Args:
        rows: the tokens to show, in order; `words` are their texts.
        cheapest: what a run calls the policy of all small.
    """
    policies = {
        ALL_SMALL: tokens.policies[Key(ALL_SMALL, 0)],
        ALL_BIG: tokens.policies[Key(ALL_BIG, tokens.space.num_layers)],
        ORACLE: tokens.oracle(big_layers),
    }
    series = []
    for name, policy in policies.items():
        look = replace(policy_look(name, cheapest), marker={ALL_SMALL: "^", ALL_BIG: "s", ORACLE: "o"}[name])
        losses = policy.nll_T[list(rows)].tolist()
        points = [Point(x, y, note=word) for x, (y, word) in enumerate(zip(losses, words, strict=True))]
        series.append(Series(look, points))

    def draw(axes: Axes, panel: Panel) -> None:
        draw_series(axes, panel)
        axes.set_xticks(range(len(words)), words, rotation=90, fontsize=8, parse_math=False)

    title = f"{tokens.domain}, oracle with k = {big_layers}"
    return Chart([[Panel(title, "", "nll (nats)", series, draw)]], 0.17 * len(words) + 1.5, 3.6, intervals="")


def _draw_counts(axes: Axes, panel: Panel) -> None:
    """Count tokens in hexagons, and divide the plane at high loss and at the median gain."""
    [tokens] = panel.series
    nll_T, gain_T = np.array([(point.x, point.y) for point in tokens.points], dtype=float).T
    # A few extreme gains would flatten all others.
    bottom, top = np.quantile(gain_T, [EXTREME_SHARE / 2, 1 - EXTREME_SHARE / 2])
    frame = float(nll_T.min()), float(nll_T.max()), float(bottom), float(top)
    look: dict[str, Any] = {"gridsize": 45, "bins": "log", "cmap": _COUNT_COLOURS, "mincnt": 1, "rasterized": True}
    shown = axes.hexbin(nll_T, gain_T, extent=frame, **look)
    line: dict[str, Any] = {"color": "#D55E00", "linestyle": "--", "linewidth": 1.3}
    axes.axvline(np.quantile(nll_T, HIGH_LOSS_QUANTILE), label=_HIGH_LOSS, **line)
    axes.axhline(np.median(gain_T), label="median gain", **line | {"linestyle": ":"})
    axes.figure.colorbar(shown, ax=axes, label="tokens", format="%g")


def route_strips(strips: Sequence[tuple[str, Integers, list[str]]]) -> Chart:
    """Return layer x token grids of branches, one above the other.

    Args:
        strips: for each strip a title, the routes [T, L] of a policy on consecutive tokens of a text, and the tokens.
    """
    panels = []
    for title, routes_TL, words in strips:
        series = []
        for layer, branch_T in enumerate(routes_TL.T.tolist()):
            points = [Point(t, branch, note=word) for t, (branch, word) in enumerate(zip(branch_T, words, strict=True))]
            series.append(Series(Look(f"layer {layer}, branch", GREY, ""), points))
        panels.append(Panel(title, "", "layer", series, _draw_strip))
    used = sorted({int(branch) for _, routes_TL, _ in strips for branch in np.unique(routes_TL)})

    def finish(figure: Figure, _: list[Axes]) -> None:
        patches = [
            Patch(facecolor=_BRANCH_COLOURS[Branch(b)], edgecolor="#999999", label=Branch(b).name.lower()) for b in used
        ]
        figure.legend(handles=patches, loc="outside lower center", ncols=len(patches))

    longest = max(len(words) for *_, words in strips)
    return Chart([[panel] for panel in panels], 0.17 * longest + 0.8, 2.6, columns=0, intervals="", finish=finish)


def _draw_strip(axes: Axes, panel: Panel) -> None:
    routes_LT = np.array([[point.y for point in series.points] for series in panel.series])
    words = [point.note for point in panel.series[0].points]
    colours = ListedColormap([_BRANCH_COLOURS[branch] for branch in Branch])
    bounds = BoundaryNorm(np.arange(len(Branch) + 1) - 0.5, len(Branch))
    axes.pcolormesh(routes_LT, cmap=colours, norm=bounds, edgecolors="white", linewidth=0.6, rasterized=True)
    axes.grid(False)
    axes.set_xticks(np.arange(len(words)) + 0.5, words, rotation=90, fontsize=8, parse_math=False)
    axes.set_yticks([0.5, len(routes_LT) - 0.5], ["0", str(len(routes_LT) - 1)])
