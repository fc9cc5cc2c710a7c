"""Ridge regression from sums of products, which can be added up batch by batch.

Shape letters: F inputs, C targets. A dot stands for any leading dimensions.
"""

import torch
from torch import Tensor


def ridge(product: Tensor, aimed: Tensor, penalty: float, held: int, free: float = 0.0) -> Tensor:
    """Return the weights W, [., F, C], that minimise |X W - Y|^2 plus the penalties on |W|^2.

    Args:
        product: X'X, [., F, F].
        aimed: X'Y, [., F, C].
        penalty: penalty on the weights of the first `held` inputs, relative to the mean of their sums of squares.
        held: number of inputs, the first ones, whose weights are penalised.
        free: relative penalty on the other weights; above zero if some of their inputs may always be zero.
    """
    square = product.diagonal(dim1=-2, dim2=-1)
    scale = square[..., :held].mean(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    added = (free * scale).expand_as(square).clone()
    added[..., :held] = penalty * scale
    return torch.linalg.solve(product + torch.diag_embed(added), aimed)
