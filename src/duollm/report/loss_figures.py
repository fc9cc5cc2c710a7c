"""Figures of loss: against the budget (paper, figure 4b), the size of a random draw (4a), its slope (4c), and cost.

And beside dense models of equal FLOPs, and one whose big FFNs were frozen (figure 8).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import nan
from pathlib import Path

from duollm.analysis.claims.models import scored_size
from duollm.analysis.claims.runs import Column
from duollm.analysis.results import BestOfRow, ComparisonRow, LossRow, Results
from duollm.records.bootstrap import Estimate, Floats, interval
from duollm.records.keys import ALL_BIG, ALL_SMALL, EXECUTED, ORACLE, PATTERNS_DRAWN, RANDOM, STATIC, numbers_in
from duollm.report.chart import OVER_DOCUMENTS, Chart, Panel, Point, Series, draw_chart, lines, write_csv
from duollm.report.style import GREY, Look, policy_look, router_looks, save, styled

_COSTS = {"relative_time": "time per token, all big = 1", "relative_flops": "FLOPs per token, all big = 1"}
_BEST_PATTERNS = Look("best of N random patterns", GREY, "")
_BEST_ROUTES = Look("best of N random routes per token", "#56B4E9", "")
_NLL = "nll (nats per token)"
_PAIRED = f"{OVER_DOCUMENTS} of the difference from all big."
_MODELS = {
    "duo": Look("duo, branches at random", "#0072B2", "o"),
    "dense": Look("dense of equal FLOPs", "#000000", "s", "--"),
    "frozen": Look("big trained first and frozen", "#D55E00", "D"),
}
_SHARE_OF_BIG = "share of big; dense: as wide as the duo is on average"


def nll_by_budget(results: Results, domains: Sequence[str], routers: Sequence[str]) -> Chart:
    """Return nll against the number of big layers for every policy, one panel per domain (or "pooled").

    Args:
        routers: the routers to show, see `PolicyRow.variant`.
    """
    looks = {
        **{policy: policy_look(policy, results.cheapest) for policy in (ALL_SMALL, ALL_BIG)},
        **{policy: policy_look(policy) for policy in (RANDOM, STATIC, EXECUTED, ORACLE)},
        **{name: look for name, look in router_looks(results.main_nll).items() if name in routers},
    }
    panels = []
    for domain in domains:
        rows = [row for row in results.main_nll if row.domain == domain]
        series = []
        for name, look in looks.items():
            mine = [row for row in rows if row.variant == name]
            if name in (ALL_SMALL, ALL_BIG):
                series += [Series(look, [Point.of(nan, _paired_row(row))], "level") for row in mine]
            elif mine:
                series.append(lines(look, [Point.of(row.mean_big_layers, _paired_row(row)) for row in mine]))
        title = "all domains pooled" if domain == "pooled" else domain
        panels.append(Panel(title, "big layers per token", _NLL, series, perplexity=True))
    return Chart([panels], 5.4, 4.4, columns=3 if len(domains) > 1 else 2, intervals=_PAIRED)


def _paired_row(row: LossRow) -> Estimate:
    return _paired(row.nll, row.over_all_big)


def _paired(nll: Estimate, over_all_big: Estimate) -> Estimate:
    """Return a loss with the interval of its difference from all big, put where all big stands.

    The interval of the mean itself would mostly show how much documents differ, which moves all policies together.
    """
    all_big = nll.value - over_all_big.value
    return Estimate(nll.value, all_big + over_all_big.low, all_big + over_all_big.high)


def best_of_draws(results: Results, big_layers: int, routers: Sequence[str]) -> Chart:
    """Return the best of N random patterns and routes against N at one budget, with oracle, static and some routers."""
    looks = router_looks(results.main_nll)

    def panel(domain: str, with_oracle: bool) -> Panel:
        patterns, routes = (
            [row for row in rows if (row.domain, row.big_layers) == (domain, big_layers)]
            for rows in (results.best_of_patterns, results.best_of_routes if with_oracle else [])
        )
        series = [_best_of(_BEST_PATTERNS, row) for row in patterns] + [_best_of(_BEST_ROUTES, row) for row in routes]
        for row in results.main_nll:
            if (row.domain, row.big_layers) != (domain, big_layers):
                continue
            estimate = _paired_row(row)
            if row.variant in routers:
                series.append(Series(looks[row.variant], [Point.of(nan, estimate)], "level"))
            elif row.policy == STATIC or (with_oracle and row.policy == ORACLE):
                series.append(Series(policy_look(row.policy), [Point.of(nan, estimate)], "level"))
            elif with_oracle and row.policy.endswith("-routes"):
                [drawn] = numbers_in(row.policy)
                series.append(Series(policy_look(row.policy), [Point.of(drawn, estimate)], "points"))
        title = f"{domain}, k = {big_layers}{'' if with_oracle else ', without the oracle'}"
        return Panel(title, "drawn at random, N", _NLL, series, ticks=(1, 3, 10, 30, 100), perplexity=True)

    grid = [[panel(domain, above) for domain in results.domains] for above in (True, False)]
    return Chart(grid, 5.4, 3.3, intervals=_PAIRED)


def oracle_sliding(results: Results) -> Chart | None:
    """Return the nll of oracles whose budget slides over the window beside those of constant budgets of the same mean.

    None if no sliding budget was searched.
    """
    panels = []
    for domain in results.domains:
        rows = [row for row in results.main_nll if row.domain == domain]
        series = []
        for k in sorted({row.big_layers for row in rows if _slope(row)}):
            mine = [row for row in rows if row.big_layers == k]
            slopes = {
                slope: row for row in mine if (slope := _slope(row)) is not None and row.context == results.context
            }
            look = replace(policy_look(ORACLE), label=f"oracle, {k} on average")
            series.append(lines(look, [Point.of(slope, _paired_row(row)) for slope, row in slopes.items()]))
            static = (Point.of(nan, _paired_row(row)) for row in mine if row.policy == STATIC)
            series += [Series(policy_look(STATIC), [point], "level") for point in static]
        panels.append(
            Panel(domain, "big layers at the start of the window - at its end", _NLL, series, perplexity=True)
        )
    return Chart([panels], 5.0, 3.4, intervals=_PAIRED) if any(panel.series for panel in panels) else None


def _slope(row: LossRow) -> int | None:
    """By how much the budget of an oracle falls over the window; None for another policy."""
    if not row.policy.startswith(f"{ORACLE}-ramp"):
        return 0 if row.policy == ORACLE else None
    first, last = numbers_in(row.policy)
    return first - last


def _best_of(look: Look, row: BestOfRow) -> Series:
    measured = zip(row.drawn, row.nll, row.over_all_big, strict=True)
    return lines(look, [Point.of(n, _paired(nll, over)) for n, nll, over in measured if n <= PATTERNS_DRAWN])


def loss_by_cost(results: Results, domain: str) -> Chart:
    """Return nll against measured time and against FLOPs, one point per router and k.

    The upper panels have the oracle and use its text. The lower ones leave it out and use the text of the comparison.
    """
    rows = [row for row in results.comparison if row.domain == domain]
    main = [(row, row.nll.value) for row in rows if row.context in (None, results.context)]
    of_compared = [(row, row.compared_nll) for row, _ in main if row.compared_nll is not None]
    ends = {ALL_SMALL: "<", ALL_BIG: ">"}
    looks = {policy: replace(policy_look(policy, results.cheapest), marker=marker) for policy, marker in ends.items()}
    looks |= {policy: policy_look(policy) for policy in (STATIC, EXECUTED, ORACLE)} | router_looks(rows)
    grid = []
    for shown, hidden, title in ((main, (), ""), (of_compared, (EXECUTED, ORACLE), "without the oracle, on more text")):
        line = []
        for cost, label in _COSTS.items():
            known = [(row, getattr(row, cost), nll) for row, nll in shown if getattr(row, cost) is not None]
            series = [_costs(name, looks[name], known) for name in looks if name not in hidden]
            line.append(Panel(title, label, _NLL, [one for one in series if one.points]))
        grid.append(line)
    return Chart(grid, 5.4, 4.2, intervals=f"{OVER_DOCUMENTS} of a router's gain over static, put at its loss.")


def _costs(name: str, look: Look, known: Sequence[tuple[ComparisonRow, float, float]]) -> Series:
    """Return a policy's points. A router's whiskers are the interval of its gain over static, put at its loss."""
    points, form = [], "points" if name in (ALL_SMALL, ALL_BIG) else "line"
    for row, cost, nll in sorted(known, key=lambda one: one[0].big_layers):
        if row.variant == name and row.kind:
            form, gain = "points", row.gain_over_static or Estimate(0.0, 0.0, 0.0)
            estimate = Estimate(nll, nll - gain.high + gain.value, nll - gain.low + gain.value)
            points.append(Point.of(cost, estimate)._replace(note=f"k = {row.big_layers}"))
        elif row.variant == name:
            points.append(Point(cost, nll, note=f"k = {row.big_layers}"))
    return Series(look, points, form)


def duo_and_dense(columns: Sequence[Column]) -> Chart | None:
    """Return loss and accuracy against the share of big, a row per seed; None if no dense or frozen run was scored."""
    grid = [line for column in columns if (line := list(_panels(column)))]
    return Chart([line for line in grid if len(line) == len(grid[0])], 5.0, 3.6) if grid else None


def _panels(column: Column) -> Iterator[Panel]:
    assert column.main.results
    title = f"{column.main.folder.name}, seed {column.seed}"
    if losses := column.losses_beside(column.main.results.headline):
        yield Panel(title, _SHARE_OF_BIG, _NLL, _series(losses), perplexity=True)
    if accuracies := column.accuracies_beside():
        yield Panel(title, _SHARE_OF_BIG, "accuracy on tasks", _series(accuracies))


def _series(beside: Mapping[tuple[str, float], tuple[Floats, Floats]]) -> list[Series]:
    points: dict[str, dict[float, Point]] = {}
    for (model, share), (other_X, duo_X) in beside.items():
        points.setdefault(model, {})[share] = Point.of(share, interval(other_X))
        points.setdefault("duo", {})[share] = Point.of(share, interval(duo_X))
    return [lines(_MODELS[model], of_model.values()) for model, of_model in points.items()]


def write_duo_and_dense(columns: Sequence[Column], folder: Path) -> Path | None:
    """Write the figure as SVG, PDF and CSV; return the SVG's path, or None if there is nothing to draw."""
    chart = duo_and_dense(columns)
    if chart is None:
        return None
    write_csv(chart, folder / "duo_and_dense.csv")
    with styled():
        sizes = (f"Seed {column.seed}: n = {scored_size(column.main.folder)}." for column in columns)
        return save(draw_chart(chart, " ".join(["Paper, figure 8.", *sizes])), folder, "duo_and_dense")
