"""Labels of a tiny model's tokens, made up or measured."""

import torch
from torch import Tensor

from duollm.oracle.labels import Labels
from duollm.routes.space import RouteSpace
from tiny import random_ids


def made_up_labels(space: RouteSpace, windows: int = 8, tokens: int = 8, seed: int = 5) -> Labels:
    """Random losses of all routes, the same in the text and expected."""
    generator = torch.Generator().manual_seed(seed)
    losses_WNR = torch.randn(windows, tokens - 1, space.size, generator=generator)
    return labels_of(space, random_ids(windows, tokens, seed=seed), losses_WNR)


def labels_of(space: RouteSpace, token_ids_WT: Tensor, losses_WNR: Tensor) -> Labels:
    """Labels with the given losses [W, N, R] of all routes."""
    centred = losses_WNR - losses_WNR.mean(-1, keepdim=True)
    return Labels(space, token_ids_WT, torch.arange(space.size), torch.stack([centred, centred]))
