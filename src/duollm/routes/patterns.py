"""Fixed patterns: routes that all tokens take.

Shape letters: L layers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from duollm.models.branch import Branch


def spread_layers(big: int, num_layers: int) -> list[int]:
    """Return `big` of `num_layers` layers, evenly spaced."""
    return [(2 * index + 1) * num_layers // (2 * big) for index in range(big)]


def pattern(big_layers: Sequence[int], num_layers: int, otherwise: Branch = Branch.SMALL) -> Tensor:
    """Return the route that is big in these layers and takes another branch elsewhere, [L]."""
    route_L = torch.full((num_layers,), int(otherwise))
    route_L[list(big_layers)] = int(Branch.BIG)
    return route_L
