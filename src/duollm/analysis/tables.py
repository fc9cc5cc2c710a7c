"""The parquet files of a run as typed columns; see docs/formats.md.

Shape letters: T tokens of the oracle, N rows of a file, D documents, R routes.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from duollm.analysis.parquet import ResultFile
from duollm.analysis.statistics import Floats, Integers, sum_by_document
from duollm.errors import UserError
from duollm.oracle.store import KINDS
from duollm.routes.space import RouteSpace

_CONTEXTS = ("shared", "reference", "committed")
_COSTS_WITHOUT_SKIP = (0.0, 0.0, 1.0)  # of skip, small, big; older files, in which no router could skip


@dataclass(frozen=True)
class Searched:
    """What the oracle found in one context, per token; dicts are keyed by big layers k.

    All but the first two are empty where they were not measured.
    """

    nll_T: dict[int, Floats]
    route_T: dict[int, Integers]
    executed_T: dict[int, Floats]
    """The loss when the picks of all tokens are executed together."""
    resampled_nll_T: dict[int, Floats]
    """The best loss of a drawn label y'."""
    resampled_score_T: dict[int, Floats]
    """The loss of a second draw y'' under the routes picked with y'."""
    ramp_nll_T: dict[tuple[int, int], Floats]
    """The oracle whose budget slides over the window, by its first and last k."""
    ramp_route_T: dict[tuple[int, int], Integers]


@dataclass(frozen=True)
class OracleTable:
    """A row per predicted token of one domain. Losses are in nats; dicts are keyed by big layers k."""

    path: Path
    domain: str
    context: str
    """The main one of `contexts`."""
    contexts: dict[str, Searched]
    search: str
    """How routes were searched; "exact": all were tried."""
    space: RouteSpace
    random_routes: int
    documents: list[str]
    document_T: Integers
    window_T: Integers
    position_T: Integers
    token_id_T: Integers
    text: list[str]
    nll_small_T: Floats
    nll_big_T: Floats
    nll_random_T: dict[int, Floats]
    nll_static_T: dict[int, Floats]
    """The cross-fitted static pattern, at the budgets for which it was run on all tokens."""
    expected_static_T: dict[int, Floats]
    """The loss that static expects when the label is drawn from the all-big prediction; may be empty."""

    @property
    def nll_oracle_T(self) -> dict[int, Floats]:
        """The oracle's loss in the main context."""
        return self.contexts[self.context].nll_T

    @property
    def route_oracle_T(self) -> dict[int, Integers]:
        """The oracle's routes in the main context."""
        return self.contexts[self.context].route_T

    @property
    def tokens_D(self) -> Integers:
        """Tokens of each document."""
        return np.bincount(self.document_T)

    def by_document(self, values_TQ: Floats) -> Floats:
        """Sum values over the tokens of each document, [D, Q...]."""
        return sum_by_document(values_TQ, self.document_T, len(self.documents))


@dataclass(frozen=True)
class PatternTable:
    """What every fixed route cost on a sample of every document's tokens, the same for all routes."""

    route_R: Integers
    """Ascending."""
    nll_sum_DR: Floats
    """Nats, over the counted tokens."""
    counted_D: Integers
    """How many of each document's tokens were counted."""


@dataclass(frozen=True)
class DocumentSums:
    """What a policy cost on each document of the text of the comparison, which the oracle's is a part of."""

    documents: list[str]
    tokens_D: Integers
    nll_D: Floats
    """Nats."""
    spent_D: Floats
    """Big layers."""


@dataclass(frozen=True)
class RouterTable:
    """A trained router on the tokens of an `OracleTable`, in the same order, and on the text of the comparison."""

    name: str
    kind: str
    spend: str
    """"average": k big layers per token on average; "exact": on every token."""
    big_layers: int
    space: RouteSpace
    """Of its routes; its branches need not be the oracle's."""
    nll_T: Floats
    route_T: Integers
    spent_T: Floats
    """What the route costs in big layers; a skipped layer counts below 0, by what it saves."""
    compared: DocumentSums
    flops_per_token: float | None
    """Forward FLOPs, head and router included; None if the file does not say."""
    router_flops_per_token: float | None


def list_domains(run: Path) -> list[str]:
    """Return the domains that the oracle has searched, in the recipe's order where the run folder knows it.

    Raises:
        UserError: there are none.
    """
    files = sorted((run / "oracle").glob("*.parquet"))
    others = tuple(f"{ending}.parquet" for ending in KINDS.values() if ending)
    domains = [file.name.removesuffix(".parquet") for file in files if not file.name.endswith(others)]
    if not domains:
        raise UserError(f"{run / 'oracle'}: no oracle results here; run `duollm oracle` first")
    order = _recipe_order(run / "data" / "manifest.json")
    return sorted(domains, key=lambda domain: (order.get(domain, len(order)), domain))


def _recipe_order(manifest: Path) -> dict[str, int]:
    """Return the place of every domain in the recipe; empty for a run on data kept elsewhere."""
    if not manifest.exists():
        return {}
    try:
        sources = json.loads(manifest.read_text(encoding="utf-8"))["sources"]
        return {source["domain"]: place for place, source in enumerate(sources)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{manifest}: not the manifest of packed data ({error}); delete {manifest.parent}") from None


def read_oracle(run: Path, domain: str) -> OracleTable:
    """Read oracle/<domain>.parquet.

    Raises:
        UserError: the file is missing or is not an oracle file.
    """
    file = ResultFile.open(run / "oracle" / f"{domain}.parquet", "duollm oracle", run / "oracle")
    context, budgets, drawn = file.fact("context"), file.fact("big_layers"), file.fact("random_routes")
    documents, document_T = file.documents()
    return OracleTable(
        path=file.path,
        domain=domain,
        context=context,
        contexts={name: _read_context(file, name, budgets) for name in _contexts(file, context)},
        search=file.facts.get("search", "exact"),
        space=file.space(),
        random_routes=drawn,
        documents=documents,
        document_T=document_T,
        window_T=file.integers("window"),
        position_T=file.integers("position"),
        token_id_T=file.integers("token_id"),
        text=file.strings("text"),
        nll_small_T=file.floats("nll_small"),
        nll_big_T=file.floats("nll_big"),
        nll_random_T=_by_budget(file, f"nll_random{drawn}", budgets),
        nll_static_T=_by_budget(file, "nll_static", budgets),
        expected_static_T=_by_budget(file, "expected_static", budgets),
    )


def _contexts(file: ResultFile, main: str) -> list[str]:
    """Return the contexts that the file holds, the main one first."""
    others = [name for name in _CONTEXTS if name != main]
    return [main, *(name for name in others if any(column.startswith(f"nll_{name}_k") for column in file.names))]


def _read_context(file: ResultFile, context: str, budgets: Sequence[int]) -> Searched:
    # A committed search is a run of its own for every budget, so it may have been made for fewer.
    searched = [k for k in budgets if context != "committed" or file.has(f"nll_{context}_k{k}")]
    ramps = [name for name in file.names if re.fullmatch(rf"nll_{context}_ramp\d+to\d+", name)]
    ends = {name.removeprefix("nll_"): tuple(map(int, name.rsplit("ramp")[1].split("to"))) for name in ramps}
    return Searched(
        nll_T={k: file.floats(f"nll_{context}_k{k}") for k in searched},
        route_T={k: file.route_ids(f"route_{context}_k{k}") for k in searched},
        executed_T=_by_budget(file, f"executed_{context}", searched),
        resampled_nll_T=_by_budget(file, f"resampled_nll_{context}", searched),
        resampled_score_T=_by_budget(file, f"resampled_score_{context}", searched),
        ramp_nll_T={(first, last): file.floats(f"nll_{name}") for name, (first, last) in ends.items()},
        ramp_route_T={(first, last): file.route_ids(f"route_{name}") for name, (first, last) in ends.items()},
    )


def _by_budget(file: ResultFile, quantity: str, budgets: Sequence[int]) -> dict[int, Floats]:
    """Read a quantity at the budgets for which the file holds it."""
    return {k: file.floats(f"{quantity}_k{k}") for k in budgets if file.has(f"{quantity}_k{k}")}


def read_patterns(run: Path, oracle: OracleTable) -> PatternTable:
    """Read oracle/<domain>.routes.parquet, documents in the order of `oracle`.

    Raises:
        UserError: the file is missing, incomplete, or belongs to other tokens.
    """
    path = run / "oracle" / f"{oracle.domain}{KINDS['routes']}.parquet"
    file = ResultFile.open(path, "duollm oracle", path.parent)
    if set(file.documents()[0]) != set(oracle.documents):
        raise UserError(f"{file.path}: its documents are not those of {oracle.path}; {file.again}")
    patterns = _patterns(file, oracle.documents)
    counted_D = patterns.counted_D
    all_counted = file.facts.get("counted_share", 1) == 1
    fewest_D = oracle.tokens_D if all_counted else 1
    if (counted_D < fewest_D).any() or (counted_D > oracle.tokens_D).any():
        raise UserError(f"{file.path}: its token counts are not those of {oracle.path}; {file.again}")
    return patterns


def read_compared_patterns(run: Path, domain: str) -> tuple[list[str], PatternTable] | None:
    """Read evaluate/<domain>.routes.parquet: the documents of the comparison, and patterns on all their tokens.

    Returns:
        None if there is none: the run is of an older version.

    Raises:
        UserError: the file is foreign or incomplete.
    """
    path = run / "evaluate" / f"{domain}{KINDS['routes']}.parquet"
    if not path.exists():
        return None
    file = ResultFile.open(path, "duollm evaluate", path.parent)
    documents, _ = file.documents()
    return documents, _patterns(file, documents)


def _patterns(file: ResultFile, documents: Sequence[str]) -> PatternTable:
    """Read the sums of all routes, documents in the given order."""
    names, own_document = file.documents()
    document = np.array([documents.index(name) for name in names])[own_document]
    route_R, column = np.unique(file.route_ids("route"), return_inverse=True)
    nll_sum_DR = np.full((len(names), len(route_R)), np.nan)
    nll_sum_DR[document, column] = file.floats("nll_sum")
    counted_D = np.zeros(len(names), dtype=np.int64)
    counted_D[document] = file.integers("tokens")
    if np.isnan(nll_sum_DR).any():
        raise UserError(f"{file.path}: some documents lack some routes; {file.again}")
    return PatternTable(route_R, nll_sum_DR, counted_D)


def read_routers(run: Path, oracle: OracleTable) -> list[RouterTable]:
    """Read evaluate/*/<domain>.parquet, ordered by kind, budget and way of spending; none is no error.

    Raises:
        UserError: a file is foreign or covers other tokens than the oracle's.
    """
    paths = (run / "evaluate").glob(f"*/{oracle.domain}.parquet")
    routers = [_read_router(path, oracle) for path in paths]
    return sorted(routers, key=lambda router: (router.kind, router.big_layers, router.spend, router.name))


def _read_router(path: Path, oracle: OracleTable) -> RouterTable:
    file = ResultFile.open(path, "duollm evaluate", path.parents[1])
    rows_T = oracle_rows(file, oracle)
    space, route_N, nll_N = file.space(), file.route_ids("route"), file.floats("nll")
    costs_B = np.array(file.facts.get("branch_costs", _COSTS_WITHOUT_SKIP), dtype=np.float64)
    spent_N = costs_B[space.decode(route_N)].sum(1)
    return RouterTable(
        name=file.fact("router"),
        kind=file.fact("kind"),
        spend=file.facts.get("spend", "average"),
        big_layers=file.fact("big_layers"),
        space=space,
        nll_T=nll_N[rows_T],
        route_T=route_N[rows_T],
        spent_T=spent_N[rows_T],
        compared=document_sums(file, nll_N, spent_N),
        flops_per_token=file.facts.get("flops_per_token"),
        router_flops_per_token=file.facts.get("router_flops_per_token"),
    )


def oracle_rows(file: ResultFile, oracle: OracleTable) -> Integers:
    """Return, for every token of the oracle, its row in a file that covers more text, or the same.

    Raises:
        UserError: the file lacks some of them, or is of another model.
    """
    place = {name: number for number, name in enumerate(oracle.documents)}
    documents, document_N = file.documents()
    oracles_N = np.array([place.get(name, len(place)) for name in documents])[document_N]
    of_file = (oracles_N, file.integers("window"), file.integers("position"))
    of_oracle = (oracle.document_T, oracle.window_T, oracle.position_T)
    shape = [1 + int(max(ours.max(), theirs.max())) for ours, theirs in zip(of_file, of_oracle, strict=True)]
    key_N, key_T = np.ravel_multi_index(of_file, shape), np.ravel_multi_index(of_oracle, shape)
    rows_T = np.flatnonzero(np.isin(key_N, key_T))
    same = np.array_equal(key_N[rows_T], key_T) and np.array_equal(file.integers("token_id")[rows_T], oracle.token_id_T)
    if not same or file.space().num_layers != oracle.space.num_layers:
        raise UserError(f"{file.path}: lacks tokens or layers of {oracle.path}; {file.again}")
    return rows_T


def document_sums(file: ResultFile, nll_N: Floats, spent_N: Floats) -> DocumentSums:
    """Sum the losses and the big layers of all rows of a file over its documents."""
    documents, document_N = file.documents()
    nll_D, spent_D = (sum_by_document(each_N, document_N, len(documents)) for each_N in (nll_N, spent_N))
    return DocumentSums(documents, np.bincount(document_N), nll_D, spent_D)
