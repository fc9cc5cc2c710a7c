"""Reads losses and routes token by token from the files of a run; see docs/formats.md.

Every file has its own names for its columns. Here each becomes a policy with a `Key`, so that no later code needs to
know from which file a policy came.

Shape letters: T tokens of the oracle, N rows of a file, D documents, L layers.
"""

import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from duollm.errors import UserError
from duollm.records.bootstrap import Floats, Integers, sum_by_document
from duollm.records.files import ResultFile
from duollm.records.keys import (
    ALL_BIG,
    ALL_SMALL,
    DRAWN_ORACLE,
    DRAWN_SECOND,
    DRAWN_STATIC,
    EXECUTED,
    ORACLE,
    RANDOM_ROUTES_CONTEXT,
    STATIC,
    Key,
    best_routes,
    ceiling_policy,
    of_unit,
    on_drawn,
    predictor_policy,
    ramp_oracle,
)
from duollm.routes.space import RouteSpace

_CONTEXTS = ("shared", "reference", "committed")
_COLUMNS = {ORACLE: "nll", EXECUTED: "executed", DRAWN_ORACLE: "resampled_nll", DRAWN_SECOND: "resampled_score"}
"""How the columns of an oracle's file begin, by policy; context and budget follow."""
_UNIT_COLUMNS = {ORACLE: "nll", DRAWN_ORACLE: "drawn", DRAWN_SECOND: "second"}
_REQUIRED = (ALL_SMALL, ALL_BIG, ORACLE)
"""The other policies are analysed where they were measured."""


@dataclass(frozen=True)
class PolicyTokens:
    """One policy, token by token.

    Attributes:
        nll_T: losses, nats.
        route_T: route ids in `space`; None if they were not kept.
        spent_T: cost of a token's route in big layers, where a skipped layer counts below 0 by what it saves; None if
            every token spends the budget.
        flops_per_token: forward FLOPs, a router's own included; None if they were not counted.
        router_flops_per_token: FLOPs of the router alone.
    """

    nll_T: Floats
    route_T: Integers | None = None
    space: RouteSpace | None = None
    spent_T: Floats | None = None
    flops_per_token: float | None = None
    router_flops_per_token: float | None = None

    @property
    def routes_TL(self) -> Integers:
        """The branch that each token takes at each layer."""
        assert self.space is not None
        assert self.route_T is not None
        return self.space.decode(self.route_T)

    def at(self, rows: Integers) -> "PolicyTokens":
        """Return the policy on some of the tokens."""
        kept: dict[str, Any] = {
            name: None if values is None else values[rows]
            for name, values in (("nll_T", self.nll_T), ("route_T", self.route_T), ("spent_T", self.spent_T))
        }
        return replace(self, **kept)


@dataclass(frozen=True)
class Tokens:
    """Policies on the same tokens of one domain, in order of document, window and position.

    Attributes:
        file: the file from which the tokens were read.
        document_T: each token's index into `documents`.
    """

    domain: str
    file: ResultFile
    documents: list[str]
    document_T: Integers
    policies: dict[Key, PolicyTokens]

    @classmethod
    def of(cls, file: ResultFile, policies: dict[Key, PolicyTokens]) -> "Tokens":
        """Put policies beside the tokens of their file. The name of the file is the domain."""
        return cls(file.path.name.removesuffix(".parquet"), file, *file.documents(), policies)

    @cached_property
    def space(self) -> RouteSpace:
        """The routes that the oracle searched."""
        return self.file.space()

    @property
    def context(self) -> str:
        """The main context, which claims and figures are about."""
        return str(self.file.fact("context"))

    @cached_property
    def window_T(self) -> Integers:
        """The window of its document that each token is in."""
        return self.file.integers("window")

    @cached_property
    def position_T(self) -> Integers:
        """The position of each predicted token in its window."""
        return self.file.integers("position")

    @cached_property
    def text(self) -> list[str]:
        """The predicted tokens, decoded."""
        return self.file.strings("text")

    @property
    def tokens_D(self) -> Integers:
        """Tokens of each document."""
        return np.bincount(self.document_T)

    def by_document(self, values_TQ: Floats) -> Floats:
        """Sum values over the tokens of each document, [D, Q...]."""
        return sum_by_document(values_TQ, self.document_T, len(self.documents))

    def oracle(self, big_layers: int) -> PolicyTokens:
        """The oracle of a budget in the main context."""
        return self.policies[Key(ORACLE, big_layers, context=self.context)]

    def searched(self) -> list[int]:
        """Return the budgets of the oracle in the main context."""
        return [key.big_layers for key in self.policies if (key.policy, key.context) == (ORACLE, self.context)]

    def routers(self) -> dict[Key, PolicyTokens]:
        """The trained routers, ordered by kind, budget and way of spending."""
        return {key: policy for key, policy in self.policies.items() if key.kind}


def read_tokens(run: Path, domain: str) -> tuple[Tokens, list[Tokens]]:
    """Read every policy on the oracle's tokens, and the files of policies that were run on more text.

    Raises:
        UserError: a file is missing, foreign, or lacks some of the oracle's tokens.
    """
    oracle = read_oracle(run, domain)
    files = [read_router(path) for path in (run / "evaluate").glob(f"*/{domain}.parquet")]
    files.sort(key=lambda file: [(key.kind, key.big_layers, key.spend, key.policy) for key in file.policies])
    ceiling = run / "ceiling" / f"{domain}.parquet"
    files += [read_ceiling(ceiling)] if ceiling.exists() else []
    policies = dict(oracle.policies)
    for file in files:
        rows_T = oracle_rows(file.file, oracle)
        policies |= {key: policy.at(rows_T) for key, policy in file.policies.items()}
    return replace(oracle, policies=policies), files


def read_oracle(run: Path, domain: str) -> Tokens:
    """Read oracle/<domain>.parquet: the oracle in every context, its controls, all small and all big.

    Raises:
        UserError: the file is missing or is not an oracle file.
    """
    file = ResultFile.open(run / "oracle" / f"{domain}.parquet", "duollm oracle", run / "oracle")
    main, budgets, drawn, space = (
        file.fact("context"),
        file.fact("big_layers"),
        file.fact("random_routes"),
        file.space(),
    )
    columns = {Key(ALL_SMALL, 0): "nll_small", Key(ALL_BIG, space.num_layers): "nll_big"}
    names = dict(_COLUMNS)
    for unit in file.facts.get("units", []):
        names |= {of_unit(policy, unit): f"unit{unit}_{column}" for policy, column in _UNIT_COLUMNS.items()}
    routes: dict[Key, Integers] = {}
    for context in _contexts(file, main):
        # A committed search is a run of its own for every budget, so it may have been made for fewer.
        searched = [k for k in budgets if context != "committed" or file.has(f"nll_{context}_k{k}")]
        for policy, column in names.items():
            columns |= {Key(policy, k, context=context): f"{column}_{context}_k{k}" for k in searched}
        routes |= {Key(ORACLE, k, context=context): file.route_ids(f"route_{context}_k{k}") for k in searched}
        drawn_routes = {k: f"resampled_route_{context}_k{k}" for k in searched}
        routes |= {
            Key(DRAWN_ORACLE, k, context=context): file.route_ids(column)
            for k, column in drawn_routes.items()
            if file.has(column)
        }
    for k in budgets:
        columns[Key(best_routes(drawn), k, context=RANDOM_ROUTES_CONTEXT)] = f"nll_random{drawn}_k{k}"
        routes |= {Key(STATIC, k): file.route_ids(name) for name in [f"route_static_k{k}"] if file.has(name)}
        columns |= {Key(STATIC, k): f"nll_static_k{k}", Key(DRAWN_STATIC, k): f"expected_static_k{k}"}
    policies = {
        key: PolicyTokens(file.floats(column), routes.get(key), space)
        for key, column in columns.items()
        if key.policy in _REQUIRED or file.has(column)
    }
    return Tokens.of(file, policies | _ramps(file, space))


def _contexts(file: ResultFile, main: str) -> list[str]:
    """Return the contexts that the file holds, the main one first."""
    others = [name for name in _CONTEXTS if name != main]
    names = file.table.column_names
    return [main, *(name for name in others if any(column.startswith(f"nll_{name}_k") for column in names))]


def _ramps(file: ResultFile, space: RouteSpace) -> dict[Key, PolicyTokens]:
    """Read the oracles whose budget slides over the window, also on drawn labels.

    Their `big_layers` is the mean of both ends.
    """
    found = {}
    for column in file.table.column_names:
        if match := re.fullmatch(rf"nll_({'|'.join(_CONTEXTS)})_ramp(\d+)to(\d+)", column):
            context, first, last = match[1], int(match[2]), int(match[3])
            route_T = file.route_ids(column.replace("nll_", "route_", 1))
            spent_T = space.count_big(route_T).astype(np.float64)
            key = Key(ramp_oracle(first, last), (first + last) // 2, context=context)
            found[key] = PolicyTokens(file.floats(column), route_T, space, spent_T)
            if file.has(f"resampled_{column}"):
                found[key._replace(policy=on_drawn(key.policy))] = PolicyTokens(file.floats(f"resampled_{column}"))
    return found


def read_router(path: Path) -> Tokens:
    """Read evaluate/<router>/<domain>.parquet."""
    file = ResultFile.open(path, "duollm evaluate", path.parents[1])
    key = Key(file.fact("router"), file.fact("big_layers"), file.fact("kind"), file.fact("spend"))
    space, route_N = file.space(), file.route_ids("route")
    spent_N = np.array(file.fact("branch_costs"), dtype=np.float64)[space.decode(route_N)].sum(1)
    flops = {name: file.fact(name) for name in ("flops_per_token", "router_flops_per_token")}
    return Tokens.of(file, {key: PolicyTokens(file.floats("nll"), route_N, space, spent_N, **flops)})


def read_ceiling(path: Path) -> Tokens:
    """Read ceiling/<domain>.parquet: every predictor, and the chosen one of each budget as the ceiling."""
    file = ResultFile.open(path, "duollm study", path.parent)
    policies = {}
    for facts in file.fact("policies"):
        route_N, k = file.route_ids(f"route_{facts['column']}"), facts["big_layers"]
        spent_N = file.space().count_big(route_N).astype(np.float64)
        policy = PolicyTokens(file.floats(f"nll_{facts['column']}"), route_N, file.space(), spent_N)
        policies[Key(predictor_policy(facts["predictor"], facts["spend"]), k)] = policy
        if facts["chosen"]:
            policies[Key(ceiling_policy(facts["spend"]), k)] = policy
    return Tokens.of(file, policies)


def oracle_rows(file: ResultFile, oracle: Tokens) -> Integers:
    """Return, for every token of the oracle, its row in a file that covers the same text or more.

    Raises:
        UserError: the file lacks some of the tokens, or is of another model.
    """
    keys = ["document", "window", "position", "token_id"]

    def numbered(table: Any, name: str) -> Any:
        return table.select(keys).append_column(name, pa.array(np.arange(table.num_rows)))

    joined = numbered(oracle.file.table, "token").join(numbered(file.table, "row"), keys, join_type="inner")
    if joined.num_rows != len(oracle.document_T) or file.space().num_layers != oracle.space.num_layers:
        raise UserError(f"{file.path}: lacks tokens or layers of {oracle.file.path}; {file.again}")
    return np.asarray(joined.sort_by("token").column("row").to_numpy(), dtype=np.int64)
