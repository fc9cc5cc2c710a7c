"""What routers have to beat: chance, early exit by confidence, expert choice with a causal predictor.

Shape letters: B batch, T tokens, L layers, C branches of the router, D hidden.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from duollm.models.branch import Branch
from duollm.models.configuration_duo import DuoConfig
from duollm.routers.base import Router
from duollm.routers.linear import LinearRouter
from duollm.routes.sampling import uniform_hash


class RandomRouter(Router):
    """Scores are drawn by chance from the token's position and the layer; the price sets the share of big."""

    objective = "none"
    every_budget = True

    def begin(self, position_ids_BT: Tensor) -> Tensor:
        """Keep the positions; they are handed from layer to layer as the memory."""
        return position_ids_BT

    def scores(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """Return uniform numbers in [0, 1), [B, T, C], float32."""
        draws = [uniform_hash(int(branch), memory, layer_idx).float() for branch in self.branches]
        return torch.stack([draw.expand(states_BTD.shape[:2]) for draw in draws], dim=-1), memory


class EarlyExitRouter(Router):
    """Big until the model is sure, then the other branch in all later layers (CALM, Schuster et al., 2022).

    A linear classifier per layer says how sure it is that the prediction will not change any more. Once the highest
    confidence so far exceeds -price, the token has left.
    """

    objective = "confidence"
    every_budget = True
    two_branches = True

    def __init__(self, config: DuoConfig, branches: Sequence[Branch]) -> None:
        super().__init__(config, branches)
        self.weight_LD = nn.Parameter(torch.zeros(self.num_layers, self.hidden_size))
        self.bias_L = nn.Parameter(torch.zeros(self.num_layers))

    def confidence(self, layer_idx: int, states_BTD: Tensor) -> Tensor:
        """Log-odds that the prediction is settled, [B, T], float32."""
        return (states_BTD @ self.weight_LD[layer_idx].to(states_BTD.dtype)).float() + self.bias_L[layer_idx]

    def scores(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """Return 0 for the other branch and for big the negative of the highest confidence so far, [B, T, 2]."""
        highest_BT = self.confidence(layer_idx, states_BTD)
        if memory is not None:
            highest_BT = torch.maximum(highest_BT, memory)
        return torch.stack([torch.zeros_like(highest_BT), -highest_BT], dim=-1), highest_BT


class MixtureOfDepthsRouter(LinearRouter):
    """Every layer sends its top tokens of each sequence to big; a predictor makes that causal (Raposo et al., 2024).

    Attributes:
        top_share: of a sequence's tokens that a layer takes in training.
        predictor_errors: of this training step, a scalar per layer.
    """

    objective = "expert-choice"
    two_branches = True

    def __init__(self, config: DuoConfig, branches: Sequence[Branch]) -> None:
        super().__init__(config, branches)
        self.predictor_LD = nn.Parameter(torch.zeros(self.num_layers, self.hidden_size))
        self.predictor_bias_L = nn.Parameter(torch.zeros(self.num_layers))
        self.top_share = 0.5
        self.predictor_errors: list[Tensor] = []

    def margin(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """Log-odds that the token is in its sequence's top, [B, T]: what decides in use."""
        odds_BT = states_BTD @ self.predictor_LD[layer_idx].to(states_BTD.dtype)
        return odds_BT.float() + self.predictor_bias_L[layer_idx], memory

    def forward(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """Choose for one layer: in training one-hot weights [B, T, 3] with a straight-through gradient."""
        if not self.training:
            return super().forward(layer_idx, states_BTD, memory)
        scores_BTC, memory = self.scores(layer_idx, states_BTD, memory)
        big_BT = (scores_BTC[..., 1] - scores_BTC[..., 0]).sigmoid()
        taken = max(1, round(self.top_share * big_BT.shape[1]))
        top_BT = torch.zeros_like(big_BT).scatter(1, big_BT.topk(taken, dim=1).indices, 1.0)
        predicted_BT, _ = self.margin(layer_idx, states_BTD.detach(), None)
        self.predictor_errors.append(binary_cross_entropy_with_logits(predicted_BT, top_BT))
        big_BT = top_BT + big_BT - big_BT.detach()
        return self.over_all_branches(torch.stack([1 - big_BT, big_BT], dim=-1)), memory
