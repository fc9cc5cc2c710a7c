"""All figures of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from duollm.analysis.claims import studied_router
from duollm.analysis.results import headline_domain, main_context_rows
from duollm.analysis.tables import OracleTable, RouterTable
from duollm.report.curves import best_of_draws, nll_by_budget
from duollm.report.layer_figures import share_over_depth, share_over_depth_and_position
from duollm.report.selection_noise import gains_by_budget
from duollm.report.style import save, styled
from duollm.report.text import first_window, one_line
from duollm.report.token_figures import RouteStrip, difficulty_by_loss, route_strips
from duollm.routing.space import focus_budgets

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

    The figure of selection noise is left out where that was not measured.
    """
    results = results | {"nll": main_context_rows(results)}
    budget = shown_budget(oracles)
    focus = sorted(set(focus_budgets(results["model"]["num_layers"])))
    strips = [strip for oracle in oracles for strip in _strips(oracle, routers[oracle.domain], budget)]
    with styled():
        figures = {
            "overview": nll_by_budget(results, [headline_domain(results)]),
            "nll_by_budget": nll_by_budget(results, list(results["data"])),
            "best_of_draws": best_of_draws(results, budget),
            "layer_use": share_over_depth(results, focus),
            "layer_use_by_position": share_over_depth_and_position(results, focus),
            "difficulty": difficulty_by_loss(oracles, results, budget),
            "routes": route_strips(strips),
        }
        if results["selection_noise"]:
            figures["selection_noise"] = gains_by_budget(results, list(results["data"]))
        return {name: save(figure, run / "figures", name) for name, figure in figures.items()}


def _strips(oracle: OracleTable, routers: Sequence[RouterTable], k: int) -> list[RouteStrip]:
    """Return the routes of the oracle and of the studied router on the start of the first document."""
    rows = first_window(oracle, 0)[:_STRIP_TOKENS]
    words = [one_line(oracle.text[t]) for t in rows]
    kind = studied_router(router.kind for router in routers)
    chosen = [("oracle", oracle.route_oracle_T[k])]
    chosen += [(f"{kind} router", one.route_T) for one in routers if (one.kind, one.big_layers) == (kind, k)][:1]
    return [
        RouteStrip(f"{oracle.domain}, {policy}, k = {k}", oracle.space.decode(route_T[rows]), words)
        for policy, route_T in chosen
    ]
