"""Baselines that routers have to beat: early exit, Mixture-of-Depths, random choices.

Shape letters: B batch, T tokens, L layers, C branches of the router, D hidden.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from duollm.models.branch import Branch
from duollm.models.configuration_duo import DuoConfig
from duollm.routers.base import Listener, Router, RouterTraining
from duollm.routers.linear import LinearRouter
from duollm.routes.sampling import uniform_hash
from duollm.training.loop import LossFn


class EarlyExitRouter(Router):
    """Takes big until the model is sure, then the other branch in all later layers (CALM: Schuster et al., 2022).

    A linear classifier per layer estimates how likely the prediction is final. Once the highest confidence so far
    exceeds -price, the token takes no more big layers.
    """

    settings = ()
    every_budget = True
    two_branches = True
    joint = False

    def __init__(self, config: DuoConfig, branches: Sequence[Branch]) -> None:
        super().__init__(config, branches)
        self.weight_LD = nn.Parameter(torch.zeros(self.num_layers, self.hidden_size))
        self.bias_L = nn.Parameter(torch.zeros(self.num_layers))

    def confidence(self, layer_idx: int, states_BTD: Tensor) -> Tensor:
        """Return the log-odds that the prediction is settled, [B, T], float32."""
        return (states_BTD @ self.weight_LD[layer_idx].to(states_BTD.dtype)).float() + self.bias_L[layer_idx]

    def scores(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """Return the scores [B, T, 2]: 0 for the other branch, minus the highest confidence so far for big."""
        highest_BT = self.confidence(layer_idx, states_BTD)
        if memory is not None:
            highest_BT = torch.maximum(highest_BT, memory)
        return torch.stack([torch.zeros_like(highest_BT), -highest_BT], dim=-1), highest_BT

    def loss_fn(self, training: RouterTraining) -> LossFn:
        """Return the cross-entropy of "the prediction at this layer is already the final one", with all layers big.

        The label says whether the most likely token, read off the states that enter the layer's branches, is that of
        the whole model (section 3.3 of the paper: the early-exit classifier).
        """
        model, all_big_L = training.model, torch.full((self.num_layers,), int(Branch.BIG))

        def loss_fn(batch_BT: Tensor, step: int, part: int) -> tuple[Tensor, dict[str, float]]:
            seen = Listener(all_big_L)
            with torch.no_grad():
                final_BT = model(input_ids=batch_BT, policy=seen, use_cache=False).logits.argmax(-1)
                settled_LBT = torch.stack([model.lm_head(states).argmax(-1) == final_BT for states in seen.states_LBTD])
            confidence_LBT = torch.stack([self.confidence(*each) for each in enumerate(seen.states_LBTD)])
            loss = binary_cross_entropy_with_logits(confidence_LBT, settled_LBT.float())
            return loss, {"settled_share": settled_LBT.float().mean().item()}

        return loss_fn


class MixtureOfDepthsRouter(LinearRouter):
    """Mixture-of-Depths (Raposo et al., 2024) on a frozen model.

    Every layer sends the top tokens of each sequence to big; a predictor makes the choice causal.

    Attributes:
        top_share: share of a sequence's tokens that take big at a layer in training.
        predictor_errors: errors of the predictor in this training step, a scalar per layer.
    """

    settings = ()
    two_branches = True

    def __init__(self, config: DuoConfig, branches: Sequence[Branch]) -> None:
        super().__init__(config, branches)
        self.predictor_LD = nn.Parameter(torch.zeros(self.num_layers, self.hidden_size))
        self.predictor_bias_L = nn.Parameter(torch.zeros(self.num_layers))
        self.top_share = 0.5
        self.predictor_errors: list[Tensor] = []

    def margin(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> tuple[Tensor, Tensor, Any]:
        """Return the log-odds that the token is among the top of its sequence, [B, T], by which it decides in use."""
        odds_BT = states_BTD @ self.predictor_LD[layer_idx].to(states_BTD.dtype)
        return odds_BT.float() + self.predictor_bias_L[layer_idx], self.values_C[0], memory

    def forward(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """Choose for one layer; in training return one-hot weights [B, T, 3] with a straight-through gradient."""
        if not self.training:
            return super().forward(layer_idx, states_BTD, memory)
        scores_BTC, memory = self.scores(layer_idx, states_BTD, memory)
        big_BT = (scores_BTC[..., 1] - scores_BTC[..., 0]).sigmoid()
        taken = max(1, round(self.top_share * big_BT.shape[1]))
        top_BT = torch.zeros_like(big_BT).scatter(1, big_BT.topk(taken, dim=1).indices, 1.0)
        predicted_BT, _, _ = self.margin(layer_idx, states_BTD.detach(), None)
        self.predictor_errors.append(binary_cross_entropy_with_logits(predicted_BT, top_BT))
        big_BT = top_BT + big_BT - big_BT.detach()
        return self.over_all_branches(torch.stack([1 - big_BT, big_BT], dim=-1)), memory

    def loss_fn(self, training: RouterTraining) -> LossFn:
        """Return the loss of the model in which the top share of each sequence takes big, plus the predictor's loss.

        The top is chosen over the whole sequence, which cannot be done while decoding. The predictor learns from one
        token's state alone whether the token is in the top (section 3.5 of the paper).
        """
        assert training.budget is not None
        self.top_share = training.budget

        def loss_fn(batch_BT: Tensor, step: int, part: int) -> tuple[Tensor, dict[str, float]]:
            self.predictor_errors.clear()
            nll = training.model(input_ids=batch_BT, labels=batch_BT, policy=self.policy(), use_cache=False).loss
            missed = torch.stack(self.predictor_errors).mean()
            return nll + missed, {"nll": nll.item(), "predictor_loss": missed.item()}

        return loss_fn


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
