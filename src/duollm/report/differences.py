"""Where a router and the oracle part ways, as text: passages coloured by spending and by loss.

Shape letters: T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from duollm.analysis.policies import router_variant
from duollm.analysis.statistics import Floats
from duollm.analysis.tables import OracleTable, RouterTable
from duollm.report.text import visible

_LENGTH = 64
_FULL_QUANTILE = 0.97


@dataclass(frozen=True)
class DifferingToken:
    """One token: what to print, shades between -1 and 1 (spending) and 0 and 1 (loss), and the numbers behind."""

    text: str
    spend_shade: float
    loss_shade: float
    numbers: str


@dataclass(frozen=True)
class DifferingPassage:
    """A stretch of one window, with the big layers and the nats at which the shades are full."""

    document: str
    router: str
    big_layers: int
    tokens: list[DifferingToken]
    spend_full: float
    loss_full: float


def differing_passages(oracle: OracleTable, router: RouterTable, count: int) -> list[DifferingPassage]:
    """Return the stretches on which the router loses most against the oracle of its budget, no two of one window.

    Shades: big layers that the router spends more (above 0) or less than the oracle, and nll(router) - nll(oracle).
    """
    k = router.big_layers
    loss_T = router.nll_T - oracle.nll_oracle_T[k]
    more_T = router.space.count_big(router.route_T) - oracle.space.count_big(oracle.route_oracle_T[k])
    loss_full = float(np.quantile(np.abs(loss_T), _FULL_QUANTILE))
    spend_full = float(max(1, np.quantile(np.abs(more_T), _FULL_QUANTILE)))
    same = (router.space.decode(router.route_T) == oracle.space.decode(oracle.route_oracle_T[k])).sum(1)

    def token(t: int) -> DifferingToken:
        numbers = (
            f"router {router.nll_T[t]:.2f}, oracle {oracle.nll_oracle_T[k][t]:.2f} nats; "
            f"{more_T[t]:+d} big layers; same branch in {same[t]} of {oracle.space.num_layers} layers"
        )
        shades = np.clip([more_T[t] / spend_full, loss_T[t] / loss_full if loss_full else 0.0], -1, 1).round(2)
        return DifferingToken(visible(oracle.text[t]), float(shades[0]), max(0.0, float(shades[1])), numbers)

    name = router_variant(router.kind, router.spend)
    return [
        DifferingPassage(
            oracle.documents[oracle.document_T[rows[0]]], name, k, [token(t) for t in rows], spend_full, loss_full
        )
        for rows in _worst_stretches(oracle, loss_T, count)
    ]


def _worst_stretches(oracle: OracleTable, loss_T: Floats, count: int) -> list[Sequence[int]]:
    """Return the rows of the stretch with the highest mean loss of each window, worst windows first."""
    window_T = np.stack([oracle.document_T, oracle.window_T], axis=1)
    _, owner_T = np.unique(window_T, axis=0, return_inverse=True)
    worst: list[tuple[float, list[int]]] = []
    for owner in range(int(owner_T.max()) + 1):
        rows = np.flatnonzero(owner_T == owner)
        length = min(_LENGTH, len(rows))
        means = np.convolve(loss_T[rows], np.full(length, 1 / length), mode="valid")
        start = int(means.argmax())
        worst.append((float(means[start]), rows[start : start + length].tolist()))
    return [rows for _, rows in sorted(worst, key=lambda each: -each[0])[:count]]
