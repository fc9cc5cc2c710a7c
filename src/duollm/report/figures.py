"""Draws all figures of a run."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.text import Text

from duollm.analysis.comparison import shown_routers
from duollm.analysis.results import Results
from duollm.records.bootstrap import Integers
from duollm.records.tokens import Tokens
from duollm.report.fonts import use_fonts_for_all_text
from duollm.report.gain_figures import (
    ceiling_budget,
    gain_by_depth,
    gains_by_budget,
    gains_by_tries,
    parts_by_budget,
)
from duollm.report.layer_figures import agreement_over_depth, share_over_depth, share_over_depth_and_position
from duollm.report.loss_figures import best_of_draws, loss_by_cost, nll_by_budget
from duollm.report.passages import first_window, one_line
from duollm.report.style import ALL_SKIPPED, save, styled
from duollm.report.token_figures import difficulty_by_loss, route_strips

_STRIP_TOKENS = 56
_LONGEST_NAME = 32


def shown_budget(domains: Sequence[Tokens]) -> int:
    """Return the budget of figures that show only one: a third of the layers, or the nearest searched budget."""
    wanted = domains[0].space.focus_budgets[0]
    everywhere = set.intersection(*(set(tokens.searched()) for tokens in domains))
    return min(sorted(everywhere), key=lambda k: abs(k - wanted))


def draw_figures(run: Path, results: Results, domains: Sequence[Tokens], pdf: bool = True) -> dict[str, Path]:
    """Write every figure to <run>/figures as SVG, and as PDF if `pdf`; return the SVGs by name.

    Figures of selection noise and of the predictable ceiling are left out if these were not measured.
    """
    budget, headline, names = shown_budget(domains), results.headline, results.domains
    focus = sorted(set(results.focus_budgets))
    shown = shown_routers(results.comparison, headline)
    few = shown[:2]
    strips = [strip for tokens in domains for strip in _strips(tokens, budget, few)]
    with styled():
        figures = {
            "overview": nll_by_budget(results, [headline], shown),
            "nll_by_budget": nll_by_budget(results, names, shown),
            "best_of_draws": best_of_draws(results, budget, shown),
            "layer_use": share_over_depth(results, focus, few),
            "layer_use_by_position": share_over_depth_and_position(results, focus, few),
            "difficulty": difficulty_by_loss(domains, results, budget),
            "routes": route_strips(strips),
        }
        if results.selection_noise:
            figures["selection_noise"] = gains_by_budget(results, names)
        if any(row.domain == headline and row.big_layers in focus for row in results.tries):
            figures["gain_by_tries"] = gains_by_tries(results, headline, focus)
        if results.timing:
            figures["pareto"] = loss_by_cost(results, headline)
        if any(row.domain == headline for row in results.agreement):
            figures["agreement"] = agreement_over_depth(results, headline, shown)
        if results.decomposition:
            figures["decomposition"] = parts_by_budget(results, names)
        if results.ceiling:
            figures["ceiling_by_depth"] = gain_by_depth(results, names, ceiling_budget(results, budget))
        shorten_names(names, figures.values())
        if "small" not in results.model["branches"]:
            _replace(ALL_SKIPPED, figures.values())
        use_fonts_for_all_text(figures.values())
        return {name: save(figure, run / "figures", name, pdf) for name, figure in figures.items()}


def _replace(words: Mapping[str, str], figures: Iterable[Figure]) -> None:
    for text in [text for figure in figures for text in figure.findobj(Text)]:
        for old, new in words.items():
            text.set_text(text.get_text().replace(old, new))


def shorten_names(names: Sequence[str], figures: Iterable[Figure]) -> None:
    """Cut the middle out of long names; a title wider than its panel would leave no room for the panel."""
    _replace({name: f"{name[:15]}…{name[-15:]}" for name in names if len(name) > _LONGEST_NAME}, figures)


def _strips(tokens: Tokens, k: int, shown: Sequence[str]) -> Iterator[tuple[str, Integers, list[str]]]:
    """Yield the routes of the oracle and of the routers `shown` on the start of the first document."""
    rows = first_window(tokens, 0)[:_STRIP_TOKENS]
    words = [one_line(tokens.text[t]) for t in rows]
    routers = {key.variant: one for key, one in tokens.routers().items() if key.big_layers == k}
    policies = {"oracle": tokens.oracle(k)} | {f"{name} router": routers[name] for name in shown if name in routers}
    for policy, one in policies.items():
        yield f"{tokens.domain}, {policy}, k = {k}", one.routes_TL[rows], words
