"""Order statistics: the best of N random routes, in expectation over the draws (no torch here).

Shape letters: M tokens, R routes, N sizes of a draw.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


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
