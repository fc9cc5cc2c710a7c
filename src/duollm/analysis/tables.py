"""The parquet files of a run as typed columns; see docs/formats.md.

Shape letters: T tokens, D documents, R routes.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from duollm.analysis.statistics import Floats, Integers
from duollm.errors import UserError
from duollm.routing.space import RouteSpace, parse_branches

_ROUTES_SUFFIX = ".routes.parquet"


@dataclass(frozen=True)
class OracleTable:
    """A row per predicted token of one domain. Losses are in nats; dicts are keyed by big layers k."""

    path: Path
    domain: str
    context: str
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
    nll_oracle_T: dict[int, Floats]
    route_oracle_T: dict[int, Integers]
    nll_random_T: dict[int, Floats]
    nll_static_T: dict[int, Floats]
    """The cross-fitted static pattern, at the budgets for which it was run on all tokens."""

    @property
    def tokens_D(self) -> Integers:
        """Tokens of each document."""
        return np.bincount(self.document_T)


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
class RouterTable:
    """A trained router on the tokens of an `OracleTable`, in the same order."""

    name: str
    kind: str
    big_layers: int
    nll_T: Floats
    route_T: Integers


def list_domains(run: Path) -> list[str]:
    """Return the domains that the oracle has searched, in the recipe's order where the run folder knows it.

    Raises:
        UserError: there are none.
    """
    files = sorted((run / "oracle").glob("*.parquet"))
    domains = [file.name.removesuffix(".parquet") for file in files if not file.name.endswith(_ROUTES_SUFFIX)]
    if not domains:
        raise UserError(f"{run / 'oracle'}: no oracle results here; run `duollm oracle` first")
    order = _recipe_order(run / "data" / "manifest.json")
    return sorted(domains, key=lambda domain: (order.get(domain, len(order)), domain))


def _recipe_order(manifest: Path) -> dict[str, int]:
    """Return the place of every domain in the recipe; empty for a run on data kept elsewhere."""
    if not manifest.exists():
        return {}
    sources = json.loads(manifest.read_text(encoding="utf-8"))["sources"]
    return {source["domain"]: place for place, source in enumerate(sources)}


def read_oracle(run: Path, domain: str) -> OracleTable:
    """Read oracle/<domain>.parquet.

    Raises:
        UserError: the file is missing or is not an oracle file.
    """
    file = _File.open(run / "oracle" / f"{domain}.parquet", "duollm oracle")
    context, budgets, drawn = file.fact("context"), file.fact("big_layers"), file.fact("random_routes")
    documents, document_T = file.documents()
    return OracleTable(
        path=file.path,
        domain=domain,
        context=context,
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
        nll_oracle_T={k: file.floats(f"nll_{context}_k{k}") for k in budgets},
        route_oracle_T={k: file.route_ids(f"route_{context}_k{k}") for k in budgets},
        nll_random_T={k: file.floats(f"nll_random{drawn}_k{k}") for k in budgets},
        nll_static_T={k: file.floats(f"nll_static_k{k}") for k in budgets if file.has(f"nll_static_k{k}")},
    )


def read_patterns(run: Path, oracle: OracleTable) -> PatternTable:
    """Read oracle/<domain>.routes.parquet, documents in the order of `oracle`.

    Raises:
        UserError: the file is missing, incomplete, or belongs to other tokens.
    """
    file = _File.open(run / "oracle" / f"{oracle.domain}{_ROUTES_SUFFIX}", "duollm oracle")
    names, own_document = file.documents()
    if set(names) != set(oracle.documents):
        raise UserError(f"{file.path}: its documents are not those of {oracle.path}; run `duollm oracle` again")
    document = np.array([oracle.documents.index(name) for name in names])[own_document]
    route_R, column = np.unique(file.route_ids("route"), return_inverse=True)
    nll_sum_DR = np.full((len(names), len(route_R)), np.nan)
    nll_sum_DR[document, column] = file.floats("nll_sum")
    counted_D = np.zeros(len(names), dtype=np.int64)
    counted_D[document] = file.integers("tokens")
    if np.isnan(nll_sum_DR).any():
        raise UserError(f"{file.path}: some documents lack some routes; run `duollm oracle` again")
    all_counted = file.facts.get("counted_share", 1) == 1
    fewest_D = oracle.tokens_D if all_counted else 1
    if (counted_D < fewest_D).any() or (counted_D > oracle.tokens_D).any():
        raise UserError(f"{file.path}: its token counts are not those of {oracle.path}; run `duollm oracle` again")
    return PatternTable(route_R, nll_sum_DR, counted_D)


def read_routers(run: Path, oracle: OracleTable) -> list[RouterTable]:
    """Read evaluate/*/<domain>.parquet, ordered by kind and budget; none is no error.

    Raises:
        UserError: a file is foreign or covers other tokens than the oracle's.
    """
    paths = (run / "evaluate").glob(f"*/{oracle.domain}.parquet")
    routers = [_read_router(path, oracle) for path in paths]
    return sorted(routers, key=lambda router: (router.kind, router.big_layers, router.name))


def _read_router(path: Path, oracle: OracleTable) -> RouterTable:
    file = _File.open(path, "duollm evaluate")
    _check_same_tokens(file, oracle)
    return RouterTable(
        name=file.fact("router"),
        kind=file.fact("kind"),
        big_layers=file.fact("big_layers"),
        nll_T=file.floats("nll"),
        route_T=file.route_ids("route"),
    )


def _check_same_tokens(file: "_File", oracle: OracleTable) -> None:
    documents, document_T = file.documents()
    same = documents == oracle.documents and np.array_equal(document_T, oracle.document_T)
    for name, column_T in (
        ("window", oracle.window_T),
        ("position", oracle.position_T),
        ("token_id", oracle.token_id_T),
    ):
        same = same and np.array_equal(file.integers(name), column_T)
    if not same or file.space() != oracle.space:
        raise UserError(
            f"{file.path}: its tokens or routes are not those of {oracle.path}; run `duollm evaluate` again"
        )


@dataclass(frozen=True)
class _File:
    """One parquet file with the facts that duollm keeps in its schema."""

    path: Path
    table: Any
    facts: dict[str, Any]
    made_by: str

    @classmethod
    def open(cls, path: Path, made_by: str) -> "_File":
        try:
            table = pq.read_table(path).combine_chunks()
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; run `{made_by}` first") from None
        except (ValueError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path}: not a readable Parquet file ({reason}); run `{made_by}` again") from None
        facts = (table.schema.metadata or {}).get(b"duollm")
        if facts is None or table.num_rows == 0:
            lack = "rows" if facts else "`duollm` metadata"
            raise UserError(f"{path}: has no {lack}, so it is not a result; run `{made_by}` again")
        return cls(path, table, json.loads(facts), made_by)

    def fact(self, key: str) -> Any:
        if key not in self.facts:
            raise UserError(f"{self.path}: its metadata lacks {key!r}; run `{self.made_by}` again")
        return self.facts[key]

    def space(self) -> RouteSpace:
        return RouteSpace(self.fact("num_layers"), parse_branches(self.fact("branches")))

    def has(self, name: str) -> bool:
        return name in self.table.column_names

    def _column(self, name: str) -> Any:
        if not self.has(name):
            raise UserError(f"{self.path}: column {name!r} is missing; run `{self.made_by}` again")
        return self.table.column(name)

    def floats(self, name: str) -> Floats:
        return np.asarray(self._column(name).to_numpy(), dtype=np.float64)

    def integers(self, name: str) -> Integers:
        return np.asarray(self._column(name).to_numpy(), dtype=np.int64)

    def strings(self, name: str) -> list[str]:
        return [str(value) for value in self._column(name).to_pylist()]

    def route_ids(self, name: str) -> NDArray[np.int64]:
        ids = self.integers(name)
        size = self.space().size
        if ids.min() < 0 or ids.max() >= size:
            raise UserError(f"{self.path}: column {name!r} holds route ids outside 0 .. {size - 1}")
        return ids

    def documents(self) -> tuple[list[str], Integers]:
        """Return the names in order of first appearance, and each row's index into them."""
        encoded = self._column("document").chunk(0).dictionary_encode()
        return encoded.dictionary.to_pylist(), np.asarray(encoded.indices.to_numpy(), dtype=np.int64)
