"""Figures of the comparison: loss against what a forward costs, and agreement with the oracle over depth."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from duollm.analysis.policies import ALL_BIG, ALL_SMALL, EXECUTED, ORACLE, STATIC, variant
from duollm.report.style import GREY, Look, Row, legend_below, panels, policy_look, router_looks

_COSTS = {"relative_time": "time per token, all big = 1", "relative_flops": "FLOPs per token, all big = 1"}
_MOST_BUDGETS = 3


def loss_by_cost(results: dict[str, Any], domain: str) -> Figure:
    """Draw nll against measured time and against FLOPs: a point per router and k.

    Above with the oracle, on its text; below without, close, and on the text of the comparison.
    """
    rows = [row for row in results["comparison"] if row["domain"] == domain]
    looks = router_looks(rows)
    main = [row for row in rows if row["context"] in (None, results["context"])]
    figure, grid = panels(2, len(_COSTS), 5.4, 4.2)
    of_compared = [row | {"nll": row["compared_nll"]} for row in main if row["compared_nll"] is not None]
    for line, with_oracle, shown in zip(grid, (True, False), (main, of_compared), strict=True):
        for axes, (cost, label) in zip(line, _COSTS.items(), strict=True):
            _draw_ends(axes, shown, cost)
            for policy in (STATIC, *((EXECUTED, ORACLE) if with_oracle else ())):
                _draw_curve(axes, [row for row in shown if row["policy"] == policy], cost, policy_look(policy))
            for name, look in looks.items():
                _draw_points(axes, [row for row in shown if row["kind"] and variant(row) == name], cost, look)
            axes.set(
                xlabel=label,
                ylabel="nll (nats per token)",
                title="" if with_oracle else "without the oracle, on more text",
            )
    legend_below(figure, grid[0][0])
    return figure


def agreement_over_depth(results: dict[str, Any], domain: str, routers: Sequence[str]) -> Figure:
    """Draw per layer the share of tokens on the oracle's branch, dotted what chance would give, at up to three k."""
    rows = [row for row in results["agreement"] if row["domain"] == domain]
    budgets = _spread(sorted({row["big_layers"] for row in rows}))
    looks = router_looks(results["comparison"])
    figure, [line] = panels(1, len(budgets), 3.9, 3.3)
    for axes, k in zip(line, budgets, strict=True):
        for row in rows:
            if row["big_layers"] == k and variant(row) in routers:
                _draw_agreement(axes, row, looks[variant(row)])
        axes.set(title=f"{domain}, k = {k}", xlabel="layer (0 is the first)", ylabel="on the oracle's branch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    line[0].plot([], [], color=GREY, linestyle=":", label="by chance, with the same shares per layer")
    legend_below(figure, line[0], columns=2)
    return figure


def _draw_ends(axes: Axes, rows: Iterable[Row], cost: str) -> None:
    for row in rows:
        if row["policy"] in (ALL_SMALL, ALL_BIG) and row[cost] is not None:
            left = row["policy"] == ALL_SMALL
            axes.plot(row[cost], row["nll"], color="#000000", marker="o")
            axes.annotate(
                policy_look(row["policy"]).label,
                (row[cost], row["nll"]),
                (6 if left else -6, 5),
                textcoords="offset points",
                ha="left" if left else "right",
            )


def _draw_curve(axes: Axes, rows: Iterable[Row], cost: str, look: Look) -> None:
    known = sorted((row for row in rows if row[cost] is not None), key=lambda row: int(row["big_layers"]))
    if known:
        axes.plot([row[cost] for row in known], [row["nll"] for row in known], **look.style)


def _draw_points(axes: Axes, rows: Iterable[Row], cost: str, look: Look) -> None:
    """Draw a router's budgets; bars are the interval of the gain over static, put where the router stands."""
    known = [row for row in rows if row[cost] is not None]
    if not known:
        return
    bars = [(_or_zero(row, "high"), _or_zero(row, "low")) for row in known]
    points = [row[cost] for row in known], [row["nll"] for row in known], np.array(bars).T
    axes.errorbar(*points, elinewidth=0.8, **look.style | {"linestyle": ""})


def _or_zero(row: Row, end: str) -> float:
    """Return how far the interval of the gain over static reaches to one side; 0 where there is no static."""
    if row["gain_over_static"] is None:
        return 0.0
    return abs(float(row[f"gain_over_static_{end}"]) - float(row["gain_over_static"]))


def _draw_agreement(axes: Axes, row: Row, look: Look) -> None:
    layers = np.arange(len(row["share_by_layer"]))
    axes.fill_between(layers, row["low"], row["high"], color=look.colour, alpha=0.2, linewidth=0)
    axes.plot(layers, row["share_by_layer"], **look.style)
    axes.plot(layers, row["share_if_independent_by_layer"], color=look.colour, linestyle=":", linewidth=1.3)


def _spread(budgets: Sequence[int]) -> list[int]:
    """Choose few of many: the ends and the middle."""
    places = np.linspace(0, len(budgets) - 1, min(_MOST_BUDGETS, len(budgets))).round().astype(int)
    return [budgets[place] for place in places]
