"""Losses at the budget that a router really spends, between the whole numbers of big layers.

A router's hard choices average near, not at, the k it was trained for, and by how much differs per domain.

Shape letters: X draws of the bootstrap.
"""

from collections.abc import Mapping
from math import ceil, floor

import numpy as np

from duollm.analysis.statistics import Floats


def nll_at(nll_X: Mapping[tuple[str, int], Floats], policy: str, spent_X: Floats) -> Floats | None:
    """Return a policy's nll [X] at `spent_X` big layers per token, linear between two neighbouring k.

    Args:
        nll_X: draws by (policy, k).
        spent_X: draws of what was spent; the data (draw 0) say which two k are the neighbours.

    Returns:
        None if the policy was not measured at one of the neighbours.
    """
    below, above = floor(spent_X[0]), ceil(spent_X[0])
    below_X, above_X = nll_X.get((policy, below)), nll_X.get((policy, above))
    if below_X is None or above_X is None:
        return None
    return np.asarray(below_X + (spent_X - below) * (above_X - below_X))
