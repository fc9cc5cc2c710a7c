"""How often a router takes the oracle's branch, layer by layer, beside what chance would give.

Shape letters: T tokens, D documents, L layers, B branches, X draws of the bootstrap.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from duollm.analysis.rows import Row
from duollm.analysis.statistics import Bootstrap, Floats, Integers, interval, intervals
from duollm.analysis.tables import OracleTable, RouterTable
from duollm.models.branch import Branch


@dataclass(frozen=True)
class Agreement:
    """A router beside the oracle of its budget: counts over the tokens of each document."""

    policy: str
    kind: str
    spend: str
    big_layers: int
    same_DL: Floats
    """Tokens that take the same branch."""
    router_DLB: Floats
    """Tokens by the router's branch."""
    oracle_DLB: Floats
    tokens_D: Integers

    def share(self, bootstrap: Bootstrap) -> Floats:
        """Return the share of tokens on the same branch, draws [X, L]."""
        return bootstrap.ratio(self.same_DL, self.tokens_D)

    def if_independent(self, bootstrap: Bootstrap) -> Floats:
        """Return the share that two choosers with these habits per layer would have by chance, draws [X, L]."""
        router_XLB, oracle_XLB = (
            bootstrap.ratio(each_DLB, self.tokens_D) for each_DLB in (self.router_DLB, self.oracle_DLB)
        )
        return np.asarray((router_XLB * oracle_XLB).sum(2))


def measure_agreement(oracle: OracleTable, routers: Sequence[RouterTable]) -> list[Agreement]:
    """Compare every router with the oracle's routes at its budget, in the main context, where it was searched."""

    def by_branch(routes_TL: Integers) -> Floats:
        return oracle.by_document((routes_TL[:, :, None] == np.array(list(Branch))).astype(np.float64))

    measured, oracle_DLB = [], {}
    for router in routers:
        k = router.big_layers
        if k not in oracle.route_oracle_T:
            continue
        picked_TL, taken_TL = oracle.space.decode(oracle.route_oracle_T[k]), router.space.decode(router.route_T)
        if k not in oracle_DLB:
            oracle_DLB[k] = by_branch(picked_TL)
        same_DL = oracle.by_document((picked_TL == taken_TL).astype(np.float64))
        measured.append(
            Agreement(
                router.name, router.kind, router.spend, k, same_DL, by_branch(taken_TL), oracle_DLB[k], oracle.tokens_D
            )
        )
    return measured


def pool_agreement(domains: Sequence[Sequence[Agreement]]) -> list[Agreement]:
    """Put the documents of all domains side by side, for the routers that every domain has."""
    tables = [{one.policy: one for one in domain} for domain in domains]
    pooled = []
    for policy, first in tables[0].items():
        if all(policy in table for table in tables):
            fields = ("same_DL", "router_DLB", "oracle_DLB", "tokens_D")
            joined: dict[str, Any] = {
                name: np.concatenate([getattr(table[policy], name) for table in tables]) for name in fields
            }
            pooled.append(replace(first, **joined))
    return pooled


def agreement_rows(domain: str, measured: Sequence[Agreement], bootstrap: Bootstrap) -> Iterator[Row]:
    """Yield each router's agreement per layer and over all layers; fields are described in docs/formats.md."""
    for one in measured:
        same_XL, chance_XL = one.share(bootstrap), one.if_independent(bootstrap)
        by_layer, over_chance = intervals(same_XL), interval((same_XL - chance_XL).mean(1))
        yield {
            "domain": domain,
            "policy": one.policy,
            "kind": one.kind,
            "spend": one.spend,
            "big_layers": one.big_layers,
            "share": float(same_XL[0].mean()),
            "share_if_independent": float(chance_XL[0].mean()),
            "over_independent": over_chance.value,
            "over_independent_low": over_chance.low,
            "over_independent_high": over_chance.high,
            "share_by_layer": [layer.value for layer in by_layer],
            "low": [layer.low for layer in by_layer],
            "high": [layer.high for layer in by_layer],
            "share_if_independent_by_layer": chance_XL[0].tolist(),
        }
