"""What every policy cost on every document, and the pooling of domains.

Shape letters: D documents, X draws of the bootstrap, R routes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from duollm.analysis.patterns import best_of, static, whole_document_sums
from duollm.analysis.statistics import Bootstrap, Floats, Integers
from duollm.analysis.tables import DocumentSums, OracleTable, PatternTable, RouterTable
from duollm.errors import UserError
from duollm.models.branch import Branch
from duollm.oracle.halves import first_half
from duollm.routes.space import RouteSpace

ALL_SMALL = "all-small"
ALL_BIG = "all-big"
ORACLE = "oracle"
EXECUTED = "executed-together"
STATIC = "static"
CEILING = "ceiling"
"""The predictable ceiling: the best that a chooser without the label reached."""
RANDOM = "random-patterns"
PATTERNS_DRAWN = 100
RANDOM_ROUTES_CONTEXT = "shared"
BEST_PATTERNS = f"best-of-{PATTERNS_DRAWN}-patterns"
EXACT = "exact"
"""The way of spending a budget on every token, not on average."""


def variant(row: Mapping[str, Any]) -> str:
    """Return what a row of results.json is a budget of: a policy, or a kind of router and its way of spending."""
    return router_variant(row["kind"], row["spend"]) if row["kind"] else str(row["policy"])


def router_variant(kind: str, spend: str | None) -> str:
    """Return the name of a kind of router with its way of spending, which is not named if it is on average."""
    return f"{kind}, exact" if spend == EXACT else kind


def ramp_oracle(first: int, last: int) -> str:
    """Return the policy name of the oracle whose budget slides from `first` to `last` big layers over the window."""
    return f"oracle-ramp{first}to{last}"


def best_routes(drawn: int) -> str:
    """Return the policy name of the best of `drawn` random routes per token."""
    return f"best-of-{drawn}-routes"


@dataclass(frozen=True)
class Score:
    """One policy at one budget: sums over the tokens of each document."""

    policy: str
    big_layers: int
    nll_D: Floats
    """Nats."""
    big_D: Floats
    """Big layers taken; in a router's routes a skipped layer counts below 0, by what it saves."""
    context: str | None = None
    kind: str | None = None
    """The kind of router; None for policies that are not trained."""
    spend: str | None = None
    """How a router spends its budget."""
    flops_D: Floats | None = None
    """Forward FLOPs of a router's tokens, the router's own included; None where not counted."""
    router_flops_D: Floats | None = None
    """The router's own."""


@dataclass(frozen=True)
class Scores:
    """All policies on the documents of one domain, or of several domains pooled."""

    domain: str
    context: str
    """The main one."""
    num_layers: int
    tokens_D: Integers
    strata: tuple[int, ...]
    """Documents per domain; a bootstrap resamples within each."""
    rows: list[Score]
    skips: bool = False
    """Whether routes of policies other than routers may skip: then k big layers do not say what they cost, and they
    cannot be compared with a router at what it spent."""

    def in_main_context(self) -> "Scores":
        """Leave out what was searched in other contexts, so that (policy, big layers) names one row."""
        return replace(self, rows=[row for row in self.rows if row.context in (None, self.context)])

    def nll_draws(self, bootstrap: Bootstrap) -> list[Floats]:
        """Return each row's mean nll [X], nats per token, on the data and on every resample."""
        return self._draws([row.nll_D for row in self.rows], bootstrap)

    def spent_draws(self, bootstrap: Bootstrap) -> list[Floats]:
        """Return each row's mean number of big layers per token [X], on the same resamples."""
        return self._draws([row.big_D for row in self.rows], bootstrap)

    def _draws(self, totals: Sequence[Floats], bootstrap: Bootstrap) -> list[Floats]:
        return list(bootstrap.ratio(np.stack(totals, axis=1), self.tokens_D).T)


def score_policies(oracle: OracleTable, patterns: PatternTable, routers: Sequence[RouterTable], seed: int) -> Scores:
    """Score every policy of one domain; `seed` splits the documents for the choice of patterns."""
    layers, tokens_D, by_document = oracle.space.num_layers, oracle.tokens_D, oracle.by_document
    documents = len(tokens_D)

    def fixed(policy: str, k: int, nll_D: Floats, context: str | None = None) -> Score:
        return Score(policy, k, nll_D, k * tokens_D.astype(np.float64), context)

    rows = [
        fixed(ALL_SMALL, 0, by_document(oracle.nll_small_T)),
        fixed(ALL_BIG, layers, by_document(oracle.nll_big_T)),
    ]
    for context, searched in oracle.contexts.items():
        rows += [fixed(ORACLE, k, by_document(nll_T), context) for k, nll_T in searched.nll_T.items()]
        rows += [fixed(EXECUTED, k, by_document(nll_T), context) for k, nll_T in searched.executed_T.items()]
    for k, nll_T in oracle.nll_random_T.items():
        rows.append(fixed(best_routes(oracle.random_routes), k, by_document(nll_T), RANDOM_ROUTES_CONTEXT))
    main = oracle.contexts[oracle.context]
    for (first, last), nll_T in main.ramp_nll_T.items():
        big_D = by_document(oracle.space.count_big(main.ramp_route_T[first, last]).astype(np.float64))
        name, mean = ramp_oracle(first, last), (first + last) // 2
        rows.append(Score(name, mean, by_document(nll_T), big_D, oracle.context))
    in_first_D = first_half(documents, seed)
    for k, nll_sum_DR in patterns_by_budget(oracle, patterns):
        exact_T = oracle.nll_static_T.get(k)
        rows.append(fixed(STATIC, k, static(nll_sum_DR, in_first_D) if exact_T is None else by_document(exact_T)))
        rows.append(fixed(BEST_PATTERNS, k, best_of(nll_sum_DR, [PATTERNS_DRAWN], in_first_D)[0]))
        rows.append(fixed(RANDOM, k, nll_sum_DR.mean(1)))
    rows += [_score_router(router, by_document, tokens_D) for router in routers]
    skips = Branch.SKIP in oracle.space.branches
    return Scores(oracle.domain, oracle.context, layers, tokens_D, (documents,), rows, skips)


def _score_router(router: RouterTable, by_document: Callable[[Floats], Floats], tokens_D: Integers) -> Score:
    def over_tokens(per_token: float | None) -> Floats | None:
        return None if per_token is None else np.asarray(per_token * tokens_D, dtype=np.float64)

    return Score(
        router.name,
        router.big_layers,
        by_document(router.nll_T),
        by_document(router.spent_T),
        kind=router.kind,
        spend=router.spend,
        flops_D=over_tokens(router.flops_per_token),
        router_flops_D=over_tokens(router.router_flops_per_token),
    )


def score_compared(
    scores: Scores,
    documents: Sequence[str],
    patterns: PatternTable,
    space: RouteSpace,
    others: Sequence[tuple[Score, DocumentSums]],
    seed: int,
) -> Scores:
    """Score on the text of the comparison what runs without the label: static, all small, all big and others.

    Args:
        scores: of the oracle's tokens, in the same domain.
        patterns: candidates for static, on these documents.
        others: policies as scored on the oracle's tokens, and their sums over the text of the comparison.

    Raises:
        UserError: a policy was run on other text.
    """
    in_first_D, tokens_D = first_half(len(documents), seed), patterns.counted_D
    big_R = space.count_big(patterns.route_R)
    rows = [
        Score(STATIC, int(k), static(patterns.nll_sum_DR[:, big_R == k], in_first_D), k * tokens_D.astype(np.float64))
        for k in np.unique(big_R)
    ]
    uniform = {ALL_SMALL: (Branch.SMALL, 0), ALL_BIG: (Branch.BIG, space.num_layers)}
    for policy, (branch, k) in uniform.items():
        route = space.encode(np.full(space.num_layers, branch)) if branch in space.branches else None
        for place in np.flatnonzero(patterns.route_R == route):
            rows.append(Score(policy, k, patterns.nll_sum_DR[:, place], k * tokens_D.astype(np.float64)))
    for score, sums in others:
        if sums.documents != list(documents) or not np.array_equal(sums.tokens_D, tokens_D):
            raise UserError(
                f"{score.policy}: was scored on other text than static, domain {scores.domain}; "
                "delete the run's folders evaluate and ceiling and run `duollm study` again"
            )
        rows.append(replace(score, nll_D=sums.nll_D, big_D=sums.spent_D, flops_D=None, router_flops_D=None))
    return replace(scores, tokens_D=tokens_D, strata=(len(documents),), rows=rows)


def patterns_by_budget(oracle: OracleTable, patterns: PatternTable) -> Iterator[tuple[int, Floats]]:
    """Yield each number of big layers with the nll sums [D, R] of its patterns over all tokens."""
    big_R = oracle.space.count_big(patterns.route_R)
    nll_sum_DR = whole_document_sums(oracle, patterns)
    for k in np.unique(big_R):
        yield int(k), nll_sum_DR[:, big_R == k]


def pool(domains: Sequence[Scores]) -> Scores:
    """Put the documents of all domains side by side, for the policies that every domain has.

    What is chosen (a static pattern) stays chosen per domain. Means are over tokens, so a
    domain counts by its number of tokens.
    """
    tables = [{(row.policy, row.big_layers, row.context): row for row in scores.rows} for scores in domains]
    everywhere = [key for key in tables[0] if all(key in table for table in tables)]
    rows = []
    for key in everywhere:
        parts = [table[key] for table in tables]
        sums = ("nll_D", "big_D", "flops_D", "router_flops_D")
        pooled = {name: _side_by_side([getattr(part, name) for part in parts]) for name in sums}
        rows.append(replace(parts[0], **pooled))
    return Scores(
        domain="pooled",
        context=domains[0].context,
        num_layers=domains[0].num_layers,
        tokens_D=np.concatenate([scores.tokens_D for scores in domains]),
        strata=tuple(len(scores.tokens_D) for scores in domains),
        rows=rows,
        skips=domains[0].skips,
    )


def _side_by_side(parts: Sequence[Floats | None]) -> Any:
    """Concatenate what every domain has; None if one of them lacks it."""
    known = [part for part in parts if part is not None]
    return np.concatenate(known) if len(known) == len(parts) else None
