"""The best of N random routes per token: its expectation, and what a run found of it (oracle/<domain>.best_of.parquet).

Shape letters: M tokens, R routes, D documents, N numbers of routes drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from duollm.records.bootstrap import Floats, Integers
from duollm.records.files import KINDS, ResultFile
from duollm.records.keys import DRAWN_STATIC, STATIC, Key
from duollm.records.tokens import Tokens


def chance_of_best(routes: int, drawn: int) -> NDArray[np.float64]:
    """Return the chance [R] that the route of rank i is the best of `drawn` distinct random ones.

    C(R-1-i, N-1) / C(R, N): rank i is drawn and the other N-1 are all of a worse rank.
    """
    rank = np.arange(routes - 1)
    ratio = np.maximum(routes - drawn - rank, 0) / (routes - 1 - rank)
    return drawn / routes * np.concatenate([[1.0], np.cumprod(ratio)])


def expected_best(
    nll_MR: NDArray[np.float32], drawn: Sequence[int], scored_MR: NDArray[np.float32] | None = None
) -> NDArray[np.float64]:
    """Return the expected lowest nll [N, M] of each token, for each number of distinct random routes.

    Args:
        scored_MR: other losses, of which those of the routes with the lowest nll are returned.
    """
    if scored_MR is None:
        ordered_MR = np.sort(nll_MR, axis=1)
    else:
        ordered_MR = np.take_along_axis(scored_MR, np.argsort(nll_MR, axis=1), axis=1)
    return np.stack([ordered_MR @ chance_of_best(nll_MR.shape[1], size) for size in drawn])


def draw_sizes(routes: int) -> list[int]:
    """Return 1, 2, 5, 10, 20, 50, ... up to and including all routes."""
    steps = [mantissa * 10**power for power in range(len(str(routes))) for mantissa in (1, 2, 5)]
    return [size for size in steps if size < routes] + [routes]


@dataclass(frozen=True)
class BestOf:
    """What a search had found at one budget, had it tried only some random routes; sums over counted tokens, nats.

    Attributes:
        drawn: the numbers of routes, ascending; the last is all.
        nll_DN: the loss of the best.
        labels: the numbers of drawn labels of a token by whose mean loss a route was chosen, ascending.
        gains: what was gained over static, [D, N]: `nll` on the text, `expected`, and `drawn1`, `second1`, ... for each
            of `labels`; empty if no labels were drawn.
        counted_D: the tokens that `gains` counts.
    """

    drawn: list[int]
    nll_DN: Floats
    labels: list[int]
    gains: dict[str, Floats]
    counted_D: Integers


def read_best_of(run: Path, oracle: Tokens) -> dict[int, BestOf]:
    """Read oracle/<domain>.best_of.parquet, by budget; empty if the run has no such file."""
    path = run / "oracle" / f"{oracle.domain}{KINDS['best_of']}.parquet"
    if not path.exists():
        return {}
    file = ResultFile.open(path, "duollm oracle", path.parent)
    names, own_document = file.documents()
    document = np.array([oracle.documents.index(name) for name in names])[own_document]
    measured = [name.removesuffix("_sum") for name in file.table.column_names if name.endswith("_sum")]
    labels = sorted(int(name.removeprefix("drawn")) for name in measured if name.startswith("drawn"))
    counted_T = oracle.file.floats("counted") if labels else np.ones(len(oracle.document_T))
    big, drawn = file.integers("big_layers"), file.integers("drawn")
    found = {}
    for k in np.unique(big).tolist():
        at_k = big == k
        sizes, size = np.unique(drawn[at_k], return_inverse=True)
        sums = {name: np.zeros((len(oracle.documents), len(sizes))) for name in measured}
        for name, sums_DN in sums.items():
            sums_DN[document[at_k], size] = file.floats(f"{name}_sum")[at_k]
        gains = {}
        for name, sums_DN in sums.items() if labels else ():
            static = oracle.policies[Key(STATIC if name == "nll" else DRAWN_STATIC, k)]
            gains[name] = oracle.by_document(counted_T * static.nll_T)[:, None] - sums_DN
        counted_D = oracle.by_document(counted_T).astype(np.int64)
        found[k] = BestOf(sizes.tolist(), sums["nll"], labels, gains, counted_D)
    return found


def pool_best_of(domains: Sequence[dict[int, BestOf]]) -> dict[int, BestOf]:
    """Put the documents of all domains side by side, at the budgets that every domain has."""
    pooled = {}
    for k, first in domains[0].items():
        if all(k in one for one in domains):
            each = [one[k] for one in domains]
            pooled[k] = replace(
                first,
                nll_DN=np.concatenate([one.nll_DN for one in each]),
                gains={name: np.concatenate([one.gains[name] for one in each]) for name in first.gains},
                counted_D=np.concatenate([one.counted_D for one in each]),
            )
    return pooled
