"""Writes the report: one HTML file that needs no network."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined

from duollm.analysis.claims import studied_router
from duollm.analysis.comparison import shown_routers
from duollm.analysis.results import GapRow, Results, read_results
from duollm.files import write_text
from duollm.records import keys
from duollm.records.keys import Key
from duollm.records.numbers import brackets, percent, with_interval
from duollm.records.tokens import read_tokens
from duollm.report.comparison import (
    SAME_AS_ITS_ORACLE,
    Cell,
    columns_in_use,
    compared,
    comparison_lines,
    estimate_cell,
    spend_table,
)
from duollm.report.figures import draw_figures, shown_budget
from duollm.report.gain_figures import ceiling_budget, decomposition_sentences, noise_sentences, of_first_context
from duollm.report.passages import differing_passages, passages
from duollm.report.token_figures import EXTREME_SHARE

_DIFFERING_PASSAGES = 2
_PLAIN = " /:=;,.()!*@$"
"""What stays as it is where an SVG stands in an attribute; written so it is a quarter smaller than in base64."""


def write_report(run: Path, shown_documents: int = 2, missing: Sequence[str] = ()) -> Path:
    """Draw the figures of an analysed run and write its report.html; return the page's path.

    Args:
        run: a run folder that holds results.json.
        shown_documents: number of documents per domain to show as coloured text.
        missing: stages of the study that have not run yet; the page names them.

    Raises:
        UserError: the run was not analysed, or a file is missing or not of this run.
    """
    results = read_results(run)
    domains = [read_tokens(run, domain)[0] for domain in results.domains]
    facts, budget, headline = domains[0].file, shown_budget(domains), results.headline
    drawn = facts.fact("random_routes")
    differing = shown_routers(results.comparison, headline, most=2)[-1:]
    of_headline = [claim for claim in results.claims if claim.domain == headline]
    figures = draw_figures(run, results, domains)
    page = _template().render(
        name=run.resolve().name,
        results=results,
        missing=missing,
        facts=list(_flatten(results.provenance)),
        layers=results.num_layers,
        context=results.context,
        random_routes=drawn,
        budget=budget,
        search=facts.fact("search"),
        executed=any(row.policy == keys.EXECUTED for row in results.main_nll),
        noise_context=next((row.context for row in of_first_context(results.selection_noise)), None),
        noise=noise_sentences(results, headline, budget),
        decomposition=decomposition_sentences(results, headline, budget),
        budget_of_ceiling=ceiling_budget(results, budget),
        glance=_glance(results, budget),
        claims=[[claim for claim in results.claims if claim.id == one.id] for one in of_headline],
        headline=headline,
        findings=of_headline,
        verdicts=Counter(claim.verdict for claim in of_headline),
        pattern_share=_pattern_share(results),
        static_exact=all(Key(keys.STATIC, budget) in tokens.policies for tokens in domains),
        extreme_share=percent(EXTREME_SHARE),
        compared_budgets=compared(results),
        compared_domains=list(dict.fromkeys(row.domain for row in results.comparison)),
        opened=min(compared(results), key=lambda k: abs(k - budget), default=budget),
        spend=spend_table(results, headline),
        differing_router=next(iter(differing), None),
        differences={
            tokens.domain: differing_passages(tokens, key, _DIFFERING_PASSAGES)
            for tokens in domains
            for key in tokens.routers()
            if key.variant in differing and key.big_layers == budget
        },
        tables={domain: _budget_table(results, domain, drawn) for domain in results.domains},
        images={name: quote(path.read_text(encoding="utf-8"), _PLAIN) for name, path in figures.items()},
        texts={tokens.domain: passages(tokens, budget, shown_documents) for tokens in domains},
    )
    write_text(run / "report.html", page)
    return run / "report.html"


def _template() -> Any:
    environment = Environment(
        loader=PackageLoader("duollm.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    functions = (with_interval, comparison_lines, columns_in_use)
    environment.globals |= {function.__name__: function for function in functions}
    return environment.get_template("template.html.jinja")


def _flatten(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted name, value) for every leaf of nested JSON objects."""
    if not isinstance(value, dict):
        yield name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        return
    for key, inner in value.items():
        yield from _flatten(inner, f"{name}.{key}" if name else key)


def _pattern_share(results: Results) -> str | None:
    """Return on which share of the tokens fixed patterns were run, or None if on all."""
    sizes = results.data.values()
    counted, tokens = sum(size.pattern_tokens for size in sizes), sum(size.tokens for size in sizes)
    return None if counted == tokens else percent(counted / tokens)


def _glance(results: Results, budget: int) -> list[tuple[str, Cell | None]]:
    """Return the few numbers that sum the run up, at one budget."""
    router = studied_router(row.kind for row in results.nll)
    ends = [(keys.ALL_SMALL, 0), (keys.ALL_BIG, results.num_layers)]
    losses = {(row.variant, row.big_layers): row for row in results.main_nll if row.domain == results.headline}
    tiles = []
    for wanted in (*ends, (keys.STATIC, budget), (router or "", budget), (keys.ORACLE, budget)):
        if row := losses.get(wanted):
            title = _heading(row.variant, [row.variant] if row.kind else [])
            label = title if wanted in ends else f"{title}, k = {budget}"
            tiles.append((label, estimate_cell(row.nll, note="nats per token")))
    for gap in results.gap_closed:
        if (gap.domain, gap.variant, gap.big_layers) == (results.headline, router, budget):
            tiles.append(("gap closed by the router", _gap_cell(gap)))
    return tiles


def _gap_cell(row: GapRow) -> Cell | None:
    """Return the gap closed at the budget spent with the nominal one beside it, or the nominal one alone."""
    if row.closed_at_spent is None:
        return estimate_cell(row.closed, percent, "from static to oracle")
    note = f"from static to oracle, at the {row.mean_big_layers:.2f} big layers spent"
    beside = f"{percent(row.closed.value)} {brackets(row.closed, percent)} at nominal k = {row.big_layers}"
    return estimate_cell(row.closed_at_spent, percent, f"{note}; {beside}")


def _budget_table(results: Results, domain: str, random_routes: int) -> tuple[list[str], dict[int, list[Cell | None]]]:
    """Return the losses of one domain: the headings of policies, and a row of cells per number of big layers."""
    losses = {(row.variant, row.context, row.big_layers): row for row in results.nll if row.domain == domain}
    main, kinds = results.context, shown_routers(results.comparison, results.headline)
    others = [context for context in dict.fromkeys(context for _, context, _ in losses) if context not in (None, main)]
    fixed: list[tuple[str, str | None]] = [
        (policy, None) for policy in (keys.RANDOM, keys.BEST_PATTERNS, keys.STATIC, *kinds)
    ]
    routes = (keys.best_routes(random_routes), keys.RANDOM_ROUTES_CONTEXT)
    wanted = [*fixed, (keys.EXECUTED, main), routes, (keys.ORACLE, main)]
    wanted += [(policy, context) for context in others for policy in (keys.EXECUTED, keys.ORACLE)]
    measured = {(policy, context) for policy, context, _ in losses}
    columns = [column for column in wanted if column in measured and column != SAME_AS_ITS_ORACLE]
    headings = [_heading(policy, kinds) + (f", {context}" if context in others else "") for policy, context in columns]
    budgets = sorted({k for *_, k in losses})
    spent = {key: f"{row.mean_big_layers:.2f} big" if row.kind else "" for key, row in losses.items()}
    cells = {key: estimate_cell(row.nll, note=spent[key]) for key, row in losses.items()}
    return headings, {k: [cells.get((*column, k)) for column in columns] for k in budgets}


def _heading(policy: str, kinds: Iterable[str]) -> str:
    return f"router ({policy})" if policy in kinds else policy.replace("-", " ")
