"""A router that knows what it did: choices so far and what is left to spend are inputs of every decision.

Shape letters: B batch, T tokens, L layers, C branches of the router, D hidden, K = L + 1 known, H random
features, F = D + H + K inputs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from duollm.models.branch import Branch
from duollm.models.configuration_duo import DuoConfig
from duollm.routers.base import branch_costs
from duollm.routers.linear import LinearRouter


class SequentialRouter(LinearRouter):
    """Marginal gains predicted from the state, the choices of earlier layers and the budget that is left.

    A big layer is worth less the more of them follow, which a router that sees one layer's state cannot know.
    What is known of a token is a vector: the cost of its choice at each layer (1 where it took big, 0 where small,
    and not yet) and how many big layers are left, as a share of all layers. One linear map per layer takes it, the
    state and random features of the state, relu(R x) with an R that is drawn once (Rahimi and Recht, "Random features
    for large-scale kernel machines", 2007): a map that is not linear, fitted like one. Training sees all budgets, so
    one serves all; in use the budget is `big_layers`.
    """

    objective = "regression"
    every_budget = True
    random_features = 64  # 1 % of a forward's FLOPs at width 512; more gain more
    big_layers: Tensor
    step_L3K: Tensor
    random_LHD: Tensor

    def __init__(self, config: DuoConfig, branches: Sequence[Branch]) -> None:
        layers, width = config.num_hidden_layers, config.hidden_size
        super().__init__(config, branches, width + self.random_features + layers + 1)
        # Scaled so that features are as large as the numbers of the state.
        self.register_buffer("random_LHD", torch.randn(layers, self.random_features, width) * (2 / width) ** 0.5)
        self.register_buffer("big_layers", torch.tensor(layers / 2))
        cost_3 = branch_costs(config)
        step_L3K = torch.cat([torch.zeros(layers, 3, layers), -cost_3.expand(layers, 3)[..., None] / layers], dim=-1)
        step_L3K[range(layers), :, range(layers)] = cost_3
        self.register_buffer("step_L3K", step_L3K, persistent=False)

    def aim(self, big_layers: int) -> None:
        """Take note of the budget."""
        self.big_layers.fill_(big_layers)

    def begin(self, position_ids_BT: Tensor) -> Tensor:
        """Nothing done, the whole budget left, [B, T, K]."""
        return self.hold(self.step_L3K.new_zeros(*position_ids_BT.shape, self.num_layers + 1), self.big_layers)

    def hold(self, memory: Any, big_layers: int | Tensor) -> Any:
        """Let each token start with so many big layers, a number or [B, 1]."""
        left_BT = torch.zeros_like(memory[..., -1]) + big_layers / self.num_layers
        return torch.cat([memory[..., :-1], left_BT[..., None]], dim=-1)

    def informed(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> Tensor:
        """The inputs of a decision, [B, T, F]."""
        features_BTH = (states_BTD @ self.random_LHD[layer_idx].to(states_BTD.dtype).T).relu()
        return torch.cat([states_BTD, features_BTH, memory.to(states_BTD.dtype)], dim=-1)

    def scores(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """Return the scores of the branches, [B, T, C], float32."""
        return super().scores(layer_idx, self.informed(layer_idx, states_BTD, memory), memory)

    def margin(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """By how much big beats the one other branch, [B, T]."""
        return super().margin(layer_idx, self.informed(layer_idx, states_BTD, memory), memory)

    def remember(self, layer_idx: int, choice: Tensor, memory: Any) -> Any:
        """Note what the choice costs, hard [B, T] or soft [B, T, 3], and take it from what is left."""
        step_3K = self.step_L3K[layer_idx]
        return memory + (choice.to(memory.dtype) @ step_3K if choice.is_floating_point() else step_3K[choice])

    def flops_per_token(self) -> int:
        """Count the random features too."""
        return super().flops_per_token() + 2 * self.random_LHD.numel()
