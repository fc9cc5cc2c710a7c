"""The record: sums of loss, cost and branches for every policy of a run on every document.

`records_of_oracle_text` and `records_of_compared_text` make records, `pool` puts the domains together, and `Draws`
turns records into means with their uncertainty. Each of these steps happens nowhere else.

Shape letters: D documents, L layers, C branches, X draws of the bootstrap (the data first). A trailing Q stands for
any further dimensions.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil, floor

import numpy as np

from duollm.errors import UserError
from duollm.models.branch import Branch
from duollm.records.bootstrap import Bootstrap, Floats, Integers
from duollm.records.keys import (
    ALL_BIG,
    ALL_SMALL,
    BEST_PATTERNS,
    CEILING,
    ORACLE,
    PATTERNS_DRAWN,
    RANDOM,
    STATIC,
    Key,
)
from duollm.records.patterns import PatternSums, best_of, first_half, static, whole_document_sums
from duollm.records.tokens import PolicyTokens, Tokens
from duollm.records.use import Sums, use_sums, window_sums

NLL, BIG, FLOPS, ROUTER_FLOPS = "nll", "big", "flops", "router_flops"
"""Sums over the tokens of a document: nats, big layers spent, FLOPs of forwards, and of routers alone."""


@dataclass(frozen=True)
class Records:
    """All policies on the documents of one domain, or of several domains pooled.

    Attributes:
        context: the main context.
        strata: number of documents per domain; the bootstrap resamples within each.
        sums: sums over the tokens of each document, [D, Q...], by quantity and policy.
        skips: whether routes of policies other than routers may choose between skip and small. Then k does not
            determine their cost, and they cannot be compared with a router at what it spent.
        possible: the numbers of big layers that the oracle's routes may have, ascending; empty if all are possible.
    """

    domain: str
    context: str
    num_layers: int
    strata: tuple[int, ...]
    tokens_D: Integers
    sums: Sums
    skips: bool = False
    possible: tuple[int, ...] = ()

    def offers_routes(self, big_layers: int) -> bool:
        """Return whether a budget is neither the fewest nor the most big layers, at which there is one route."""
        fewest, most = (self.possible[0], self.possible[-1]) if self.possible else (0, self.num_layers)
        return fewest < big_layers < most

    @cached_property
    def policies(self) -> list[Key]:
        """The policies that tables show, in order: of oracles whose budget slides, those of the main context."""
        shown = [key for quantity, key in self.sums if quantity == NLL and not key.auxiliary]
        return [key for key in shown if key.context == self.context or not key.policy.startswith(f"{ORACLE}-")]


def pool(domains: Sequence[Records]) -> Records:
    """Put the documents of all domains side by side, for the quantities that every domain has.

    A static pattern stays chosen per domain. Means are over tokens, so a domain counts by its number of tokens.
    """
    first = domains[0]
    return Records(
        domain="pooled",
        context=first.context,
        num_layers=first.num_layers,
        strata=tuple(documents for one in domains for documents in one.strata),
        tokens_D=np.concatenate([one.tokens_D for one in domains]),
        sums={
            name: np.concatenate([one.sums[name] for one in domains])
            for name in first.sums
            if all(name in one.sums for one in domains)
        },
        skips=first.skips,
        possible=first.possible,
    )


def records_of_oracle_text(tokens: Tokens, patterns: PatternSums, seed: int) -> Records:
    """Sum every policy on the oracle's text. `seed` splits the documents for the choice of patterns."""
    sums: Sums = {}
    in_first_D, tokens_D = first_half(len(tokens.documents), seed), tokens.tokens_D
    choosers = {key: one for key, one in tokens.policies.items() if key.kind or key.policy.startswith(CEILING)}
    for key, one in tokens.policies.items():
        if key.policy != STATIC and key not in choosers:
            sums |= _sums(tokens, key, one)
    for k, nll_DR in patterns.by_budget(whole_document_sums(tokens, patterns)):
        known = tokens.policies.get(Key(STATIC, k))
        chosen_D = static(nll_DR, in_first_D) if known is None else tokens.by_document(known.nll_T)
        sums |= _fixed(Key(STATIC, k), chosen_D, tokens_D)
        sums |= _fixed(Key(BEST_PATTERNS, k), best_of(nll_DR, [PATTERNS_DRAWN], in_first_D)[0], tokens_D)
        sums |= _fixed(Key(RANDOM, k), nll_DR.mean(1), tokens_D)
    for key, one in choosers.items():
        sums |= _sums(tokens, key, one)
    return _records(tokens, tokens_D, sums | use_sums(tokens))


def records_of_compared_text(oracle: Tokens, files: Iterable[Tokens], patterns: PatternSums, seed: int) -> Records:
    """Sum the policies that see no label on the text of the comparison.

    Raises:
        UserError: a policy was run on another text.
    """
    tokens_D, in_first_D = patterns.counted_D, first_half(len(patterns.documents), seed)
    sums: Sums = {}
    for k, nll_DR in patterns.by_budget():
        sums |= _fixed(Key(STATIC, k), static(nll_DR, in_first_D), tokens_D)
    ends = ((Key(ALL_SMALL, 0), oracle.space.lowest), (Key(ALL_BIG, oracle.space.num_layers), Branch.BIG))
    for key, branch in ends:
        nll_D = patterns.uniform(branch)
        sums |= {} if nll_D is None else _fixed(key, nll_D, tokens_D)
    for file in files:
        if file.documents != patterns.documents or not np.array_equal(file.tokens_D, tokens_D):
            raise UserError(
                f"{file.file.path}: covers other text than static was run on; "
                "delete the run's folders evaluate and ceiling and run `duollm study` again"
            )
        for key, one in file.policies.items():
            sums |= _sums(file, key, one) | (window_sums(file, key, one) if key.kind else {})
    return _records(oracle, tokens_D, sums)


def _records(oracle: Tokens, tokens_D: Integers, sums: Sums) -> Records:
    skips = len(oracle.space.branches) > 2
    layers, possible = oracle.space.num_layers, tuple(oracle.space.big_layers)
    return Records(oracle.domain, oracle.context, layers, (len(tokens_D),), tokens_D, sums, skips, possible)


def _fixed(key: Key, nll_D: Floats, tokens_D: Integers) -> Sums:
    return {(NLL, key): nll_D, (BIG, key): key.big_layers * tokens_D.astype(np.float64)}


def _sums(tokens: Tokens, key: Key, one: PolicyTokens) -> Sums:
    tokens_D = tokens.tokens_D.astype(np.float64)
    sums = _fixed(key, tokens.by_document(one.nll_T), tokens.tokens_D)
    if one.spent_T is not None:
        sums[BIG, key] = tokens.by_document(one.spent_T)
    if one.flops_per_token is not None:
        sums[FLOPS, key] = one.flops_per_token * tokens_D
    if one.router_flops_per_token is not None:
        sums[ROUTER_FLOPS, key] = one.router_flops_per_token * tokens_D
    return sums


class Draws:
    """Means per token of the sums in records: for the data (draw 0) and for every resample of the documents.

    All policies are drawn on the same resamples, so a difference of two draws is paired.
    """

    def __init__(self, records: Records, samples: int, seed: int) -> None:
        self.records = records
        ends = np.cumsum(records.strata)[:-1]
        self.bootstrap = Bootstrap(np.split(records.tokens_D, ends), samples, seed)
        self._means: Sums = {}
        self._key = {
            (key.policy, key.big_layers): key
            for quantity, key in records.sums
            if quantity == NLL and key.context in (None, records.context)
        }

    def __contains__(self, key: Key) -> bool:
        return (NLL, key) in self.records.sums

    def __getitem__(self, key: Key) -> Floats:
        """Return the mean nll of a policy, draws [X]."""
        return self.mean(NLL, key)

    def mean(self, quantity: str, key: Key) -> Floats:
        """Return the mean per token of any quantity that was summed, draws [X, Q...]."""
        if (quantity, key) not in self._means:
            sums_DQ = self.records.sums[quantity, key]
            self._means[quantity, key] = self.bootstrap.ratio(sums_DQ, self.records.tokens_D)
        return self._means[quantity, key]

    def spent(self, key: Key) -> Floats:
        """Return the mean number of big layers per token that a policy spent, draws [X]."""
        return self.mean(BIG, key)

    def nll(self, policy: str | None, big_layers: int) -> Floats | None:
        """Return the mean nll of a policy by name, of oracles in the main context; None if it was not measured."""
        key = self._key.get((policy or "", big_layers))
        return None if key is None else self[key]

    def nll_at(self, policy: str, spent_X: Floats) -> Floats | None:
        """Return a policy's mean nll at `spent_X` big layers per token; see the function of the same name."""
        return nll_at(self.nll, policy, spent_X, self.records.possible)


def neighbours(spent: float, possible: Sequence[int]) -> tuple[int, int]:
    """Return the possible numbers of big layers next to `spent`, which may be it twice; empty: all are possible."""
    below = max((k for k in possible if k <= spent), default=floor(spent))
    return below, min((k for k in possible if k >= spent), default=ceil(spent))


def nll_at(
    nll: Callable[[str, int], Floats | None], policy: str, spent_X: Floats, possible: Sequence[int] = ()
) -> Floats | None:
    """Return a policy's mean nll [X] at `spent_X` big layers per token, linear between two neighbouring k.

    A router spends near, not exactly at, the k it was trained for, and the distance differs per domain. The data (draw
    0) decide which two k are the neighbours.

    Args:
        nll: the draws of a policy at k; None if it was not measured there.
        possible: the numbers of big layers among which the neighbours are; empty: all whole numbers.

    Returns:
        None if the policy was not measured at one of the neighbours.
    """
    below, above = neighbours(spent_X[0], possible)
    below_X, above_X = nll(policy, below), nll(policy, above)
    if below_X is None or above_X is None:
        return None
    return np.asarray(below_X + (spent_X - below) / max(1, above - below) * (above_X - below_X))
