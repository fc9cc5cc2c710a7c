"""All figures of a run."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from duollm.analysis.comparison import shown_routers
from duollm.analysis.policies import router_variant
from duollm.analysis.results import headline_domain, main_context_rows
from duollm.analysis.tables import OracleTable, RouterTable
from duollm.report.comparison_figures import agreement_over_depth, loss_by_cost
from duollm.report.curves import best_of_draws, nll_by_budget
from duollm.report.decomposition import ceiling_budget, gain_by_depth, parts_by_budget
from duollm.report.fonts import use_fonts_for_all_text
from duollm.report.layer_figures import share_over_depth, share_over_depth_and_position
from duollm.report.selection_noise import gains_by_budget
from duollm.report.style import save, styled
from duollm.report.text import first_window, one_line
from duollm.report.token_figures import RouteStrip, difficulty_by_loss, route_strips
from duollm.routes.space import focus_budgets

_STRIP_TOKENS = 56


def shown_budget(oracles: Sequence[OracleTable]) -> int:
    """Return the budget of figures that show one: a third of the layers, or the nearest that was searched."""
    wanted = focus_budgets(oracles[0].space.num_layers)[0]
    shared = set.intersection(*(set(oracle.nll_oracle_T) for oracle in oracles))
    return min(sorted(shared), key=lambda k: abs(k - wanted))


def draw_figures(
    run: Path, results: dict[str, Any], oracles: Sequence[OracleTable], routers: dict[str, list[RouterTable]]
) -> dict[str, Path]:
    """Write every figure to <run>/figures as SVG and PDF; return the SVGs by name.

    Figures of selection noise and of the predictable ceiling are left out where these were not measured.
    """
    results = results | {"nll": main_context_rows(results)}
    budget = shown_budget(oracles)
    focus = sorted(set(focus_budgets(results["model"]["num_layers"])))
    headline = headline_domain(results)
    shown = shown_routers(results["comparison"], headline)
    few = shown[:2]
    strips = [strip for oracle in oracles for strip in _strips(oracle, routers[oracle.domain], budget, few)]
    with styled():
        figures = {
            "overview": nll_by_budget(results, [headline], shown),
            "nll_by_budget": nll_by_budget(results, list(results["data"]), shown),
            "best_of_draws": best_of_draws(results, budget, shown),
            "layer_use": share_over_depth(results, focus, few),
            "layer_use_by_position": share_over_depth_and_position(results, focus, few),
            "difficulty": difficulty_by_loss(oracles, results, budget),
            "routes": route_strips(strips),
        }
        if results["selection_noise"]:
            figures["selection_noise"] = gains_by_budget(results, list(results["data"]))
        if results["timing"]:
            figures["pareto"] = loss_by_cost(results, headline)
        if any(row["domain"] == headline for row in results["agreement"]):
            figures["agreement"] = agreement_over_depth(results, headline, shown)
        if results["decomposition"]:
            figures["decomposition"] = parts_by_budget(results, list(results["data"]))
        if results["ceiling"]:
            figures["ceiling_by_depth"] = gain_by_depth(results, list(results["data"]), ceiling_budget(results, budget))
        use_fonts_for_all_text(figures.values())
        return {name: save(figure, run / "figures", name) for name, figure in figures.items()}


def _strips(oracle: OracleTable, routers: Sequence[RouterTable], k: int, shown: Sequence[str]) -> Iterator[RouteStrip]:
    """Yield the routes of the oracle and of the routers `shown` on the start of the first document."""
    rows = first_window(oracle, 0)[:_STRIP_TOKENS]
    words = [one_line(oracle.text[t]) for t in rows]
    named = {router_variant(one.kind, one.spend): one for one in routers if one.big_layers == k}
    routes = {"oracle": oracle.space.decode(oracle.route_oracle_T[k][rows])}
    routes |= {f"{name} router": named[name].space.decode(named[name].route_T[rows]) for name in shown if name in named}
    for policy, routes_TL in routes.items():
        yield RouteStrip(f"{oracle.domain}, {policy}, k = {k}", routes_TL, words)
