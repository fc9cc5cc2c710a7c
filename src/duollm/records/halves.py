"""Two halves of the documents: a fixed pattern is chosen on one and scored on the other (no torch here).

Shape letters: D documents, R routes.
"""

import numpy as np
from numpy.typing import NDArray

from duollm.errors import UserError


def first_half(documents: int, seed: int) -> NDArray[np.bool_]:
    """Return which documents [D] belong to the first half of a seeded random split.

    Raises:
        UserError: fewer than two documents.
    """
    if documents < 2:
        raise UserError(
            "a fixed pattern is chosen on one half of the documents and scored on the other, "
            f"which needs at least 2 documents per domain, got {documents}"
        )
    order = np.random.default_rng(seed).permutation(documents)
    return np.asarray(np.isin(np.arange(documents), order[: documents // 2]))


def best_on_other_half(nll_sum_DR: NDArray[np.float64], in_first_D: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return for each document [D] the index of the route with the lowest sum over the other half.

    Ties go to the first route.
    """
    best = {half: int(nll_sum_DR[in_first_D == half].sum(0).argmin()) for half in (True, False)}
    return np.asarray([best[not half] for half in in_first_D.tolist()])
