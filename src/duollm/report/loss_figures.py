"""Figures of loss: against the budget (paper, figure 4b), the size of a random draw (4a), and what a forward costs."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from duollm.analysis.results import BestOfRow, ComparisonRow, LossRow, Results
from duollm.records.bootstrap import Estimate
from duollm.records.keys import ALL_BIG, ALL_SMALL, EXECUTED, ORACLE, PATTERNS_DRAWN, RANDOM, STATIC
from duollm.report import style
from duollm.report.style import Look

_COSTS = {"relative_time": "time per token, all big = 1", "relative_flops": "FLOPs per token, all big = 1"}
_ROUTES_COLOUR = "#56B4E9"


def nll_by_budget(results: Results, domains: Sequence[str], routers: Sequence[str]) -> Figure:
    """Draw nll against the number of big layers for every policy, one panel per domain (or "pooled").

    Args:
        routers: the routers to show, see `PolicyRow.variant`.
    """
    looks = style.router_looks(results.main_nll)
    figure, panels = style.domain_panels(domains, 4.4, "big layers per token", "nll (nats per token)")
    for domain, axes in panels.items():
        rows = [row for row in results.main_nll if row.domain == domain]
        for policy in (ALL_SMALL, ALL_BIG):
            level, look = next(row.nll.value for row in rows if row.policy == policy), style.policy_look(policy)
            axes.axhline(level, color=look.colour, linestyle=look.line, linewidth=1.2, label=look.label)
        for policy in (RANDOM, STATIC, EXECUTED, ORACLE):
            _draw_budgets(axes, [row for row in rows if row.policy == policy], style.policy_look(policy))
        for name, look in looks.items():
            if name in routers:
                _draw_budgets(axes, [row for row in rows if row.variant == name], look)
    style.legend_below(figure, axes, columns=3 if len(domains) > 1 else 2)
    return figure


def _draw_budgets(axes: Axes, rows: Sequence[LossRow], look: Look) -> None:
    if not rows:
        return
    rows = sorted(rows, key=lambda row: row.mean_big_layers)
    spent = [row.mean_big_layers for row in rows]
    style.draw_band(axes, spent, [_paired(row.nll, row.over_all_big) for row in rows], look.colour)
    axes.plot(spent, [row.nll.value for row in rows], **look.style)


def _paired(nll: Estimate, over_all_big: Estimate) -> Estimate:
    """Return a loss with the interval of its difference from all big, put where all big stands.

    The interval of the mean itself would mostly show how much documents differ, which moves all policies together.
    """
    all_big = nll.value - over_all_big.value
    return Estimate(nll.value, all_big + over_all_big.low, all_big + over_all_big.high)


def best_of_draws(results: Results, big_layers: int, routers: Sequence[str]) -> Figure:
    """Draw the best of N random patterns and routes against N at one budget, with oracle, static and some routers."""
    looks = style.router_looks(results.main_nll)
    figure, [above, below] = style.panels(2, len(results.domains), 5.4, 3.3)
    for line, closeness in ((above, ""), (below, ", without the oracle")):
        for axes, domain in zip(line, results.domains, strict=True):
            for rows, colour, label in (
                (results.best_of_patterns, style.GREY, "best of N random patterns"),
                ([] if closeness else results.best_of_routes, _ROUTES_COLOUR, "best of N random routes per token"),
            ):
                _draw_best_of(axes, [row for row in rows if _is(row, domain, big_layers)], colour, label)
            for row in results.main_nll:
                if _is(row, domain, big_layers) and (not row.kind or row.variant in routers):
                    _draw_level(axes, row, looks, with_oracle=not closeness)
            axes.set(title=f"{domain}, k = {big_layers}{closeness}", xscale="log", ylabel="nll (nats per token)")
            axes.set_xlabel("drawn at random, N")
            axes.set_xticks([1, 3, 10, 30, 100], ["1", "3", "10", "30", "100"])
    style.legend_below(figure, above[0])
    return figure


def _is(row: LossRow | BestOfRow, domain: str, big_layers: int) -> bool:
    return (row.domain, row.big_layers) == (domain, big_layers)


def _draw_best_of(axes: Axes, rows: Sequence[BestOfRow], colour: str, label: str) -> None:
    for row in rows:
        shown = [size for size in row.drawn if size <= PATTERNS_DRAWN]
        paired = [_paired(*pair) for pair in zip(row.nll, row.over_all_big, strict=True)][: len(shown)]
        style.draw_band(axes, shown, paired, colour, alpha=0.2)
        axes.plot(shown, [one.value for one in paired], color=colour, label=label)


def _draw_level(axes: Axes, row: LossRow, routers: dict[str, Look], with_oracle: bool) -> None:
    paired = _paired(row.nll, row.over_all_big)
    if row.policy == STATIC or row.kind or (with_oracle and row.policy == ORACLE):
        look = routers[row.variant] if row.kind else style.policy_look(row.policy)
        axes.axhspan(paired.low, paired.high, color=look.colour, alpha=0.12, linewidth=0)
        axes.axhline(row.nll.value, color=look.colour, linestyle=look.line, label=look.label)
    elif with_oracle and row.policy.endswith("-routes"):
        look, drawn = style.policy_look(row.policy), int(row.policy.split("-")[2])
        error = [[paired.value - paired.low], [paired.high - paired.value]]
        axes.errorbar(drawn, paired.value, error, color=look.colour, marker=look.marker, capsize=3, label=look.label)


def loss_by_cost(results: Results, domain: str) -> Figure:
    """Draw nll against measured time and against FLOPs, one point per router and k.

    The upper panels have the oracle and use its text. The lower ones leave it out and use the text of the comparison.
    """
    rows = [row for row in results.comparison if row.domain == domain]
    main = [(row, row.nll.value) for row in rows if row.context in (None, results.context)]
    of_compared = [(row, row.compared_nll) for row, _ in main if row.compared_nll is not None]
    figure, grid = style.panels(2, len(_COSTS), 5.4, 4.2)
    for line, with_oracle, shown in zip(grid, (True, False), (main, of_compared), strict=True):
        for axes, (cost, label) in zip(line, _COSTS.items(), strict=True):
            known = [(row, getattr(row, cost), nll) for row, nll in shown if getattr(row, cost) is not None]
            _draw_costs(axes, known, style.router_looks(rows), with_oracle)
            axes.set(
                xlabel=label,
                ylabel="nll (nats per token)",
                title="" if with_oracle else "without the oracle, on more text",
            )
    style.legend_below(figure, grid[0][0])
    return figure


def _draw_costs(
    axes: Axes, known: Sequence[tuple[ComparisonRow, float, float]], routers: dict[str, Look], with_oracle: bool
) -> None:
    """Draw rows, each with its cost and nll: both ends, curves, and routers.

    The bars of routers are the interval of the gain over static, put where the router stands.
    """
    for row, cost, nll in known:
        if row.policy in (ALL_SMALL, ALL_BIG):
            side = 1 if row.policy == ALL_SMALL else -1
            axes.plot(cost, nll, color="#000000", marker="o")
            label, aligned = style.policy_look(row.policy).label, "left" if side > 0 else "right"
            axes.annotate(label, (cost, nll), (6 * side, 5), textcoords="offset points", ha=aligned)
    for policy in (STATIC, *((EXECUTED, ORACLE) if with_oracle else ())):
        curve = sorted((row.big_layers, cost, nll) for row, cost, nll in known if row.policy == policy)
        if curve:
            axes.plot([cost for _, cost, _ in curve], [nll for *_, nll in curve], **style.policy_look(policy).style)
    for name, look in routers.items():
        mine = [one for one in known if one[0].kind and one[0].variant == name]
        if not mine:
            continue
        gains = [row.gain_over_static or Estimate(0.0, 0.0, 0.0) for row, *_ in mine]
        bars = np.array([(abs(gain.high - gain.value), abs(gain.low - gain.value)) for gain in gains]).T
        points = [cost for _, cost, _ in mine], [nll for *_, nll in mine]
        axes.errorbar(*points, bars, elinewidth=0.8, **look.style | {"linestyle": ""})
