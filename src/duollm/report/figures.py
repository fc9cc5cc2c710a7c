"""Draws all figures of a run."""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.text import Text

from duollm.analysis.claims.routers import FIGURE_7
from duollm.analysis.comparison import shown_routers
from duollm.analysis.difficulty import is_python
from duollm.analysis.results import Results
from duollm.records.bootstrap import Integers
from duollm.records.tokens import Tokens
from duollm.report.chart import draw_chart, write_csv
from duollm.report.gain_figures import (
    gain_by_depth,
    gains_by_budget,
    gains_by_class,
    gains_by_context,
    gains_by_tries,
    parts_by_budget,
)
from duollm.report.layer_figures import agreement_over_depth, share_over_depth, share_over_depth_and_position
from duollm.report.loss_figures import best_of_draws, loss_by_cost, nll_by_budget, oracle_sliding
from duollm.report.style import save, styled, use_fonts_for_all_text
from duollm.report.token_figures import difficulty_by_loss, losses_of_text, route_strips
from duollm.terminal import one_line

CAPTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "agreement": ("How often routers take the oracle's branch, by layer, against chance.", ()),
    "best_of_draws": ("Best of N random patterns and routes against N (paper, figure 4a).", ("C1",)),
    "ceiling_by_depth": ("What a predictor gains, by the last layer whose states it sees.", ()),
    "contexts": ("What the oracle gains in every context, on true labels, on drawn ones, and executed together.", ()),
    "decomposition": ("What the oracle's gain is made of: predictable, luck of the choice, rest.", ()),
    "difficulty": ("What all big and the oracle gain on each token against its loss (paper, figure 5).", ("C11",)),
    "difficulty_by_class": (
        "Loss by class of tokens, and what the oracle saves of it, on true labels, on drawn ones, and as predicted.",
        ("C12",),
    ),
    "gain_by_tries": (
        "What the search gains by the number of routes tried, on true labels and on drawn ones.",
        (),
    ),
    "layer_use": ("Share of big by layer (paper, figure 2).", ("C6", "C7", "C8", "C9")),
    "layer_use_by_position": ("Share of big by layer and position (paper, figure 3).", ("C10",)),
    "losses_of_text": ("Losses of the first Python document, token by token (paper, figure 6).", ("C12",)),
    "nll_by_budget": ("Loss against the number of big layers, by domain (paper, figure 4b).", ("C2", "C3", "C4")),
    "oracle_sliding": ("Loss of the oracle whose budget slides over the window (paper, figure 4c).", ("C5",)),
    "overview": ("Loss against the number of big layers, all domains pooled.", ("C2", "C3", "C4")),
    "pareto": ("Loss against measured time and FLOPs, routers' own cost included.", ()),
    "routes": ("Routes of the first document, token by token (paper, figure 7).", ("C13",)),
    "selection_noise": ("What the oracle's search gains on true labels and on drawn ones.", ()),
}
"""What each figure shows, and the claims that it bears on."""
_STRIP_TOKENS = 56
_FEW_TOKENS = {"losses_of_text": _STRIP_TOKENS, "routes": _STRIP_TOKENS}
"""Figures of the start of a document, with its length."""
_ON_COMPARED_TEXT = ("ceiling_by_depth",)
"""Figures of the text of the comparison; the others show the oracle's text."""
_LONGEST_NAME = 32


def draw_figures(run: Path, results: Results, domains: Sequence[Tokens]) -> dict[str, Path]:
    """Write every figure to <run>/figures as SVG and PDF, with the CSV behind it; return the SVGs by name.

    Figures of selection noise and of the predictable ceiling are left out if these were not measured.
    """
    budget, headline, names = results.searched_budget, results.headline, results.domains
    focus = sorted(set(results.focus_budgets))
    shown = shown_routers(results.comparison, headline)
    few = shown[:2]
    # The paper shows routers at 0.3 and 0.5 of the layers.
    more = sorted({round(share * results.num_layers) for share in FIGURE_7} - {budget})
    strips = [strip for tokens in domains for k in (budget, *more) for strip in _strips(tokens, k, few, k == budget)]
    charts = {
        "overview": nll_by_budget(results, [headline], shown),
        "nll_by_budget": nll_by_budget(results, names, shown),
        "best_of_draws": best_of_draws(results, budget, shown),
        "layer_use": share_over_depth(results, focus, few),
        "layer_use_by_position": share_over_depth_and_position(results, focus, few),
        "difficulty": difficulty_by_loss(domains, results, budget),
        "routes": route_strips(strips),
    }
    if sliding := oracle_sliding(results):
        charts["oracle_sliding"] = sliding
    if code := next((tokens for tokens in domains if is_python(tokens)), None):
        rows, words = _start_of_text(code)
        charts["losses_of_text"] = losses_of_text(code, rows, words, budget, results.cheapest)
    if results.selection_noise:
        charts["selection_noise"] = gains_by_budget(results, names)
    if contexts := gains_by_context(results, names):
        charts["contexts"] = contexts
    if classes := gains_by_class(results):
        charts["difficulty_by_class"] = classes
    if any(row.domain == headline and row.big_layers in focus for row in results.tries):
        charts["gain_by_tries"] = gains_by_tries(results, headline, focus)
    if results.timing:
        charts["pareto"] = loss_by_cost(results, headline)
    if any(row.domain == headline for row in results.agreement):
        charts["agreement"] = agreement_over_depth(results, headline, shown)
    if results.decomposition:
        charts["decomposition"] = parts_by_budget(results, names)
    if results.ceiling:
        charts["ceiling_by_depth"] = gain_by_depth(results, names, results.shown_budget(results.ceiling))
    for name, chart in charts.items():
        write_csv(chart, run / "figures" / f"{name}.csv")
    with styled():
        letters = f"k of L = {results.num_layers} layers are big;"
        notes = {name: f"{_number(name, results)}{letters} {sample(name, results)}" for name in charts}
        figures = {name: draw_chart(chart, notes[name]) for name, chart in charts.items()}
        shorten_names(names, figures.values())
        use_fonts_for_all_text(figures.values())
        return {name: save(figure, run / "figures", name) for name, figure in figures.items()}


def caption(name: str, results: Results) -> tuple[str, tuple[str, ...]]:
    """Return what a figure shows, and the claims that it bears on."""
    text, claims = CAPTIONS.get(name, ("", ()))
    if results.model.get("architecture") == "opt" and name.startswith("layer_use"):
        return re.sub(r"figure \d", "figure 9", text), ("C16",)  # the paper shows its OPT in a figure of its own
    return text, claims


def _number(name: str, results: Results) -> str:
    """Return the number that the caption gives a figure, for the picture itself."""
    found = re.search(r"\(paper, (figure \w+)\)", caption(name, results)[0])
    return f"Paper, {found[1]}. " if found else ""


def sample(name: str, results: Results) -> str:
    """Return how much text a figure is drawn from, and the seed."""
    seed = f"seed {results.provenance.get('seed', 'unknown')}."
    if name in _FEW_TOKENS:
        return f"n = {_FEW_TOKENS[name]} tokens at most; {seed}"
    sizes = list(results.data.values())
    documents, tokens = sum(size.documents for size in sizes), sum(size.tokens for size in sizes)
    if name in _ON_COMPARED_TEXT:
        documents = sum(size.compared_documents or size.documents for size in sizes)
        tokens = sum(size.compared_tokens or size.tokens for size in sizes)
    return f"n = {tokens:,} tokens of {documents:,} documents; {seed}"


def shorten_names(names: Sequence[str], figures: Iterable[Figure]) -> None:
    """Cut the middle out of long names; a title wider than its panel would leave no room for the panel."""
    short = {name: f"{name[:15]}…{name[-15:]}" for name in names if len(name) > _LONGEST_NAME}
    for text in [text for figure in figures for text in figure.findobj(Text)]:
        for old, new in short.items():
            text.set_text(text.get_text().replace(old, new))


def _start_of_text(tokens: Tokens) -> tuple[list[int], list[str]]:
    """Return the first tokens of the first document, all of one window, and their texts."""
    in_window_T = (tokens.document_T == 0) & (tokens.window_T == tokens.window_T[tokens.document_T == 0].min())
    rows = np.flatnonzero(in_window_T)[:_STRIP_TOKENS].tolist()
    return rows, [one_line(tokens.text[t]) for t in rows]


def _strips(
    tokens: Tokens, k: int, shown: Sequence[str], with_oracle: bool
) -> Iterator[tuple[str, Integers, list[str]]]:
    """Yield the routes of routers, and perhaps of the oracle, on the start of the first document."""
    rows, words = _start_of_text(tokens)
    routers = {key.variant: one for key, one in tokens.routers().items() if key.big_layers == k}
    policies = {"oracle": tokens.oracle(k)} if with_oracle else {}
    policies |= {f"{name} router": routers[name] for name in shown if name in routers}
    for policy, one in policies.items():
        yield f"{tokens.domain}, {policy}, k = {k}", one.routes_TL[rows], words
