"""Figures of loss: against the budget (paper, figure 4b) and against the size of a random draw (4a)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from duollm.analysis.policies import ALL_BIG, ALL_SMALL, EXECUTED, ORACLE, RANDOM, STATIC, variant
from duollm.report.style import GREY, Look, Row, legend_below, panels, policy_look, router_looks


def nll_by_budget(results: dict[str, Any], domains: Sequence[str], routers: Sequence[str]) -> Figure:
    """Draw nll against the number of big layers for every policy, a panel per domain (or "pooled").

    Args:
        routers: which are shown, see `variant`.
    """
    figure, [row] = panels(1, len(domains), 5.4, 4.4)
    looks = {name: look for name, look in router_looks(results["nll"]).items() if name in routers}
    for axes, domain in zip(row, domains, strict=True):
        rows = [one for one in results["nll"] if one["domain"] == domain]
        _draw_budgets(axes, rows, looks)
        title = "all domains pooled" if domain == "pooled" else domain
        axes.set(title=title, xlabel="big layers per token", ylabel="nll (nats per token)")
    legend_below(figure, row[0], columns=3 if len(domains) > 1 else 2)
    return figure


def best_of_draws(results: dict[str, Any], big_layers: int, routers: Sequence[str]) -> Figure:
    """Draw the best of N random patterns against N at one budget, beside oracle, static and the named routers."""
    domains, looks = list(results["data"]), router_looks(results["nll"])
    results = results | {"nll": [row for row in results["nll"] if not row["kind"] or variant(row) in routers]}
    figure, [whole, close] = panels(2, len(domains), 5.4, 3.3)
    for row, closeness in ((whole, ""), (close, ", without the oracle")):
        for axes, domain in zip(row, domains, strict=True):
            _draw_best_of(axes, results, domain, big_layers, looks, with_oracle=not closeness)
            axes.set(title=f"{domain}, k = {big_layers}{closeness}", xscale="log", ylabel="nll (nats per token)")
            axes.set_xlabel("random patterns drawn, N")
            axes.set_xticks([1, 3, 10, 30, 100], ["1", "3", "10", "30", "100"])
    legend_below(figure, whole[0])
    return figure


def _draw_budgets(axes: Axes, rows: list[Row], routers: dict[str, Look]) -> None:
    for policy in (ALL_SMALL, ALL_BIG):
        _draw_level(axes, next(row for row in rows if row["policy"] == policy), policy_look(policy))
    for policy in (RANDOM, STATIC, EXECUTED, ORACLE):
        if mine := [row for row in rows if row["policy"] == policy]:
            _draw_line(axes, mine, policy_look(policy))
    for name, look in routers.items():
        if mine := [row for row in rows if variant(row) == name]:
            _draw_line(axes, mine, look)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_line(axes: Axes, rows: list[Row], look: Look) -> None:
    rows = sorted(rows, key=lambda row: float(row["mean_big_layers"]))
    spent = [row["mean_big_layers"] for row in rows]
    low, high = zip(*(_paired_band(row) for row in rows), strict=True)
    axes.fill_between(spent, low, high, color=look.colour, alpha=0.18, linewidth=0)
    nll = [row["nll"] for row in rows]
    axes.plot(spent, nll, **look.style)


def _draw_level(axes: Axes, row: Row, look: Look) -> None:
    axes.axhline(row["nll"], color=look.colour, linestyle=look.line, linewidth=1.2, label=look.label)


def _draw_best_of(
    axes: Axes, results: dict[str, Any], domain: str, big_layers: int, routers: dict[str, Look], with_oracle: bool
) -> None:
    rows = [row for row in results["nll"] if row["domain"] == domain and row["big_layers"] == big_layers]
    for curve in results["best_of_patterns"]:
        if curve["domain"] == domain and curve["big_layers"] == big_layers:
            low, high = _paired_band({key: np.array(value) for key, value in curve.items()})
            axes.fill_between(curve["drawn"], low, high, color=GREY, alpha=0.2, linewidth=0)
            axes.plot(curve["drawn"], curve["nll"], color=GREY, label="best of N random patterns")
    for row in rows:
        if row["policy"] == STATIC or row["kind"] or (with_oracle and row["policy"] == ORACLE):
            _draw_band(axes, row, routers[variant(row)] if row["kind"] else policy_look(row["policy"]))
        elif with_oracle and row["policy"].endswith("-routes"):
            _draw_best_routes(axes, row)


def _draw_best_routes(axes: Axes, row: Row) -> None:
    look, drawn = policy_look(row["policy"]), int(row["policy"].split("-")[2])
    low, high = _paired_band(row)
    error = [[row["nll"] - low], [high - row["nll"]]]
    axes.errorbar(drawn, row["nll"], error, color=look.colour, marker=look.marker, capsize=3, label=look.label)


def _draw_band(axes: Axes, row: Row, look: Look) -> None:
    axes.axhspan(*_paired_band(row), color=look.colour, alpha=0.12, linewidth=0)
    axes.axhline(row["nll"], color=look.colour, linestyle=look.line, label=look.label)


def _paired_band(row: Row) -> tuple[Any, Any]:
    """Return the interval of the difference from all big, put where all big stands.

    The interval of the mean itself would mostly show how much documents differ, which moves all policies together.
    """
    all_big = row["nll"] - row["over_all_big"]
    return all_big + row["over_all_big_low"], all_big + row["over_all_big_high"]
