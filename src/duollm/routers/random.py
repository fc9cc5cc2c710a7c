"""Random choices, a baseline that routers have to beat.

Shape letters: B batch, T tokens, C branches of the router, D hidden.
"""

from typing import Any

import torch
from torch import Tensor

from duollm.routers.base import Router, RouterTraining
from duollm.routes.sampling import uniform_hash


class RandomRouter(Router):
    """Draws scores from a hash of the token's position and the layer; the price sets the share of big."""

    settings = ()
    every_budget = True
    joint = False

    def begin(self, position_ids_BT: Tensor, big_layers: int | Tensor | None = None) -> Tensor:
        """Return the positions, which pass from layer to layer as the memory."""
        return position_ids_BT

    def scores(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """Return uniform numbers in [0, 1), [B, T, C], float32."""
        draws = [uniform_hash(int(branch), memory, layer_idx).float() for branch in self.branches]
        return torch.stack([draw.expand(states_BTD.shape[:2]) for draw in draws], dim=-1), memory

    def fit(self, training: RouterTraining) -> None:
        """Learn nothing; calibration sets the price."""
