"""Selection noise: how much of the oracle's gain over static a mere peek at the label buys.

The oracle picks the best of thousands of routes with the label in hand. The same search with a label y'
drawn from the model's own all-big prediction shows what such a peek buys when nothing but chance is
peeked at; a second draw y'' shows what the routes picked with y' are worth to another label.

Shape letters: D documents, Q quantities, X draws of the bootstrap.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from duollm.analysis.policies import ORACLE, STATIC, Scores
from duollm.analysis.statistics import Bootstrap, Floats, intervals
from duollm.analysis.tables import OracleTable

QUANTITIES = ("gain", "gain_drawn", "second_draw", "gain_beyond_drawn")


@dataclass(frozen=True)
class SelectionNoise:
    """Gains over static at one budget, as sums over the tokens of each document."""

    context: str
    big_layers: int
    gains_DQ: Floats
    """Nats; the columns are `QUANTITIES`."""


def measure_noise(oracle: OracleTable, scores: Scores) -> list[SelectionNoise]:
    """Return the gains in every context and at every budget for which labels were drawn.

    With no or all layers big there is one route only, so nothing is picked and the budget is left out.
    """
    nll_D = {(row.policy, row.context, row.big_layers): row.nll_D for row in scores.rows}
    measured = []
    for context, searched in oracle.contexts.items():
        for k, picked_T in searched.resampled_nll_T.items():
            if not 0 < k < scores.num_layers or k not in oracle.expected_static_T:
                continue
            drawn_TQ = np.stack([picked_T, searched.resampled_score_T[k]], axis=1)
            gains_TQ = oracle.expected_static_T[k][:, None] - drawn_TQ
            gains_DQ = oracle.by_document(gains_TQ)
            gain_D = nll_D[STATIC, None, k] - nll_D[ORACLE, context, k]
            gains_DQ = np.column_stack([gain_D, gains_DQ, gain_D - gains_DQ[:, 0]])
            measured.append(SelectionNoise(context, k, gains_DQ))
    return measured


def pool_noise(domains: Sequence[Sequence[SelectionNoise]]) -> list[SelectionNoise]:
    """Put the documents of all domains side by side, where every domain was measured."""
    tables = [{(one.context, one.big_layers): one for one in domain} for domain in domains]
    everywhere = [key for key in tables[0] if all(key in table for table in tables)]
    return [
        replace(tables[0][key], gains_DQ=np.concatenate([table[key].gains_DQ for table in tables]))
        for key in everywhere
    ]


def noise_rows(scores: Scores, noise: Sequence[SelectionNoise], bootstrap: Bootstrap) -> Iterator[dict[str, Any]]:
    """Yield the mean gains with their intervals; fields are described in docs/formats.md."""
    for one in noise:
        row: dict[str, Any] = {"domain": scores.domain, "context": one.context, "big_layers": one.big_layers}
        estimates = intervals(bootstrap.ratio(one.gains_DQ, scores.tokens_D))
        for quantity, estimate in zip(QUANTITIES, estimates, strict=True):
            row |= {quantity: estimate.value, f"{quantity}_low": estimate.low, f"{quantity}_high": estimate.high}
        yield row
