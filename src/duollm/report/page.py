"""The page: one offline HTML file that shows what a run found."""

from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from duollm.analysis.claims import studied_router
from duollm.analysis.comparison import shown_routers
from duollm.analysis.numbers import estimate, nats, percent
from duollm.analysis.policies import (
    ALL_BIG,
    ALL_SMALL,
    BEST_PATTERNS,
    EXECUTED,
    ORACLE,
    RANDOM,
    RANDOM_ROUTES_CONTEXT,
    STATIC,
    best_routes,
    router_variant,
    variant,
)
from duollm.analysis.results import headline_domain, main_context_rows, read_results
from duollm.analysis.tables import OracleTable, RouterTable, read_oracle, read_routers
from duollm.files import write_text
from duollm.report.comparison import (
    SAME_AS_ITS_ORACLE,
    Cell,
    Line,
    SpendTable,
    columns_in_use,
    compared,
    comparison_lines,
    spend_table,
)
from duollm.report.decomposition import ceiling_budget, decomposition_sentences
from duollm.report.differences import DifferingPassage, differing_passages
from duollm.report.figures import draw_figures, shown_budget
from duollm.report.selection_noise import noise_sentences, shown_noise
from duollm.report.style import Row
from duollm.report.text import passages
from duollm.report.token_figures import EXTREME_SHARE

_DIFFERING_PASSAGES = 2


@dataclass(frozen=True)
class ClaimRow:
    """One claim of the paper with its outcome in every domain."""

    id: str
    statement: str
    outcomes: list[Row]


@dataclass(frozen=True)
class LinesTable:
    """The comparison in one domain at one budget; columns in which nothing was measured are left out."""

    lines: list[Line]
    columns: list[str]


@dataclass(frozen=True)
class Comparison:
    """What the section on the comparison shows; `shown` is the budget that is open first."""

    headline: str
    domains: list[str]
    budgets: list[int]
    shown: int
    tables: dict[tuple[str, int], LinesTable]
    spend: SpendTable


@dataclass(frozen=True)
class BudgetTable:
    """The losses of one domain: a row per number of big layers, a column per policy."""

    domain: str
    columns: list[str]
    rows: list[tuple[int, list[Cell | None]]]


def write_report(run: Path, shown_documents: int = 2) -> Path:
    """Draw the figures of an analysed run and write its report.html; return the page's path.

    Args:
        run: a run folder that holds results.json.
        shown_documents: documents per domain that are shown as coloured text.

    Raises:
        UserError: the run was not analysed, or a file is missing or foreign.
    """
    results = read_results(run)
    oracles = [read_oracle(run, domain) for domain in results["data"]]
    routers = {oracle.domain: read_routers(run, oracle) for oracle in oracles}
    budget, headline = shown_budget(oracles), headline_domain(results)
    figures = draw_figures(run, results, oracles, routers)
    page = _template().render(
        name=run.resolve().name,
        results=results,
        facts=list(_flatten(results["provenance"])),
        layers=results["model"]["num_layers"],
        context=oracles[0].context,
        random_routes=oracles[0].random_routes,
        budget=budget,
        search=oracles[0].search,
        executed=any(row["policy"] == EXECUTED for row in main_context_rows(results)),
        noise_context=next((row["context"] for row in shown_noise(results)), None),
        noise=noise_sentences(results, headline, budget),
        decomposition=decomposition_sentences(results, headline, budget),
        budget_of_ceiling=ceiling_budget(results, budget),
        glance=_glance(results, headline, budget),
        claims=_claim_rows(results["claims"]),
        headline=headline,
        findings=_of(results["claims"], headline),
        verdicts=Counter(claim["verdict"] for claim in _of(results["claims"], headline)),
        pattern_share=_pattern_share(results),
        static_exact=all(oracle.nll_static_T for oracle in oracles),
        extreme_share=percent(EXTREME_SHARE),
        comparison=_comparison(results, headline, budget),
        differences=_differences(results, headline, oracles, routers, budget),
        tables=[_budget_table(results, domain, oracles[0].random_routes) for domain in results["data"]],
        images={name: _data_uri(path) for name, path in figures.items()},
        texts={oracle.domain: passages(oracle, budget, shown_documents) for oracle in oracles},
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
    environment.globals["estimate"] = estimate
    return environment.get_template("template.html.jinja")


def _interval(row: Row) -> str:
    return f"[{nats(row['low'])}, {nats(row['high'])}]"


def _data_uri(image: Path) -> str:
    return f"data:image/svg+xml;base64,{b64encode(image.read_bytes()).decode()}"


def _flatten(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted name, value) for every leaf of nested JSON objects."""
    if not isinstance(value, dict):
        yield name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        return
    for key, inner in value.items():
        yield from _flatten(inner, f"{name}.{key}" if name else key)


def _pattern_share(results: dict[str, Any]) -> str | None:
    """Return on which share of the tokens fixed patterns were run, or None if on all."""
    sizes = results["data"].values()
    counted, tokens = (sum(size[key] for size in sizes) for key in ("pattern_tokens", "tokens"))
    return None if counted == tokens else percent(counted / tokens)


def _glance(results: dict[str, Any], domain: str, budget: int) -> list[tuple[str, Cell]]:
    """Return the few numbers that sum the run up, at one budget."""
    router = studied_router(row["kind"] for row in results["nll"])
    layers = results["model"]["num_layers"]
    wanted = [(ALL_SMALL, 0), (ALL_BIG, layers), (STATIC, budget), (router, budget), (ORACLE, budget)]
    losses = {(variant(row), row["big_layers"]): row for row in _of(main_context_rows(results), domain)}
    tiles = []
    for policy, k in wanted:
        if policy and (row := losses.get((policy, k))):
            label = _title(row) if policy in (ALL_SMALL, ALL_BIG) else f"{_title(row)}, k = {k}"
            tiles.append((label, Cell(nats(row["nll"]), _interval(row), "nats per token")))
    for row in _of(results["gap_closed"], domain):
        if (variant(row), row["big_layers"]) == (router, budget):
            tiles.append(("gap closed by the router", _gap_cell(row)))
    return tiles


def _gap_cell(row: Row) -> Cell:
    """Return the gap closed at the budget spent with the nominal one beside it, or the nominal one alone."""
    nominal = Cell(percent(row["closed"]), f"[{percent(row['low'])}, {percent(row['high'])}]", "from static to oracle")
    if row["closed_at_spent"] is None:
        return nominal
    interval = f"[{percent(row['closed_at_spent_low'])}, {percent(row['closed_at_spent_high'])}]"
    note = f"from static to oracle, at the {row['mean_big_layers']:.2f} big layers spent"
    beside = f"{nominal.value} {nominal.interval} at nominal k = {row['big_layers']}"
    return Cell(percent(row["closed_at_spent"]), interval, f"{note}; {beside}")


def _claim_rows(claims: list[Row]) -> list[ClaimRow]:
    ids = dict.fromkeys(claim["id"] for claim in claims)
    grouped = [[claim for claim in claims if claim["id"] == name] for name in ids]
    return [ClaimRow(same[0]["id"], same[0]["statement"], same) for same in grouped]


def _budget_table(results: dict[str, Any], domain: str, random_routes: int) -> BudgetTable:
    mine = _of(results["nll"], domain)
    losses = {(variant(row), row["context"], row["big_layers"]): row for row in mine}
    main, kinds = results["context"], shown_routers(results["comparison"], headline_domain(results))
    others = [context for context in dict.fromkeys(row["context"] for row in mine) if context not in (None, main)]
    wanted: list[tuple[str, str | None]] = [(policy, None) for policy in (RANDOM, BEST_PATTERNS, STATIC, *kinds)]
    wanted += [(EXECUTED, main), (best_routes(random_routes), RANDOM_ROUTES_CONTEXT), (ORACLE, main)]
    wanted += [(policy, context) for context in others for policy in (EXECUTED, ORACLE)]
    measured = {(policy, context) for policy, context, _ in losses}
    columns = [column for column in wanted if column in measured and column != SAME_AS_ITS_ORACLE]
    return BudgetTable(
        domain,
        [_heading(policy, kinds) + (f", {context}" if context in others else "") for policy, context in columns],
        [(k, [_cell(losses.get((*column, k))) for column in columns]) for k in sorted({k for *_, k in losses})],
    )


def _comparison(results: dict[str, Any], headline: str, budget: int) -> Comparison:
    budgets, domains = compared(results), list(dict.fromkeys(row["domain"] for row in results["comparison"]))
    tables = {}
    for domain in domains:
        for k in budgets:
            lines = comparison_lines(results, domain, k)
            tables[domain, k] = LinesTable(lines, columns_in_use(lines))
    shown = min(budgets, key=lambda k: abs(k - budget), default=budget)
    return Comparison(headline, domains, budgets, shown, tables, spend_table(results, headline))


def _differences(
    results: dict[str, Any],
    headline: str,
    oracles: Sequence[OracleTable],
    routers: dict[str, list[RouterTable]],
    budget: int,
) -> dict[str, list[DifferingPassage]]:
    """Return, by domain, where a router differs most from the oracle: the best of the others beside the paper's."""
    shown = shown_routers(results["comparison"], headline, most=2)[-1:]
    found = {}
    for oracle in oracles:
        for router in routers[oracle.domain]:
            named = router_variant(router.kind, router.spend) in shown
            if named and router.big_layers == budget and budget in oracle.nll_oracle_T:
                found[oracle.domain] = differing_passages(oracle, router, _DIFFERING_PASSAGES)
    return found


def _of(rows: Iterable[Row], domain: str) -> list[Row]:
    return [row for row in rows if row["domain"] == domain]


def _title(row: Row) -> str:
    return _heading(variant(row), [variant(row)] if row["kind"] else [])


def _heading(policy: str, kinds: Iterable[str]) -> str:
    return f"router ({policy})" if policy in kinds else policy.replace("-", " ")


def _cell(row: Row | None) -> Cell | None:
    if row is None:
        return None
    spent = f"{row['mean_big_layers']:.2f} big" if row["kind"] else ""
    return Cell(nats(row["nll"]), _interval(row), spent)
