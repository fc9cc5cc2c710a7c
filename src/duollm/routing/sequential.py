"""A router that knows what it did: choices so far and what is left to spend are inputs of every decision.

Shape letters: B batch, T tokens, L layers, C branches of the router, D hidden, R rank, M memory, K = M + 1.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from duollm.models.branch import Branch
from duollm.models.configuration_duo import DuoConfig
from duollm.routing.gains import DeepGainsRouter


class SequentialRouter(DeepGainsRouter):
    """Marginal gains predicted from the state, the choices of earlier layers and the budget that is left.

    A big layer is worth less the more of them follow, which a router that sees one layer's state cannot know.
    The memory holds M numbers, updated after every layer by tanh(carry m + e), where e is an embedding of layer and
    branch (mixed, if the choice is soft), and how many big layers are left. Both enter the bottleneck, the
    latter divided by the number of layers left. Training sees all budgets, so one serves all; in use the
    budget is `big_layers`.
    """

    memory_width = 8
    big_layers: Tensor

    def __init__(self, config: DuoConfig, branches: Sequence[Branch]) -> None:
        super().__init__(config, branches)
        width, choices = self.memory_width, len(self.branches)
        self.embed_LCM = nn.Parameter(0.5 * torch.randn(self.num_layers, choices, width))
        self.carry_MM = nn.Parameter(torch.eye(width))
        self.known_LRK = nn.Parameter(torch.zeros(self.num_layers, self.rank, width + 1))
        self.register_buffer("big_layers", torch.tensor(self.num_layers / 2))

    def aim(self, big_layers: int) -> None:
        """Take note of the budget."""
        self.big_layers.fill_(big_layers)

    def begin(self, position_ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Nothing done, the whole budget left: zeros [B, T, M] and big layers [B, T]."""
        nothing_BTM = self.carry_MM.new_zeros(*position_ids_BT.shape, self.memory_width)
        return nothing_BTM, self.big_layers.expand(position_ids_BT.shape)

    def hold(self, memory: Any, big_layers: int | Tensor) -> Any:
        """Let each token start with so many big layers, a number or [B, 1]."""
        carried_BTM, left_BT = memory
        return carried_BTM, torch.zeros_like(left_BT) + big_layers

    def narrow(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> Tensor:
        """The bottleneck's activations, [B, T, R]."""
        carried_BTM, left_BT = memory
        share_BT1 = (left_BT / (self.num_layers - layer_idx))[..., None]
        known_BTK = torch.cat([carried_BTM, share_BT1], dim=-1).to(states_BTD.dtype)
        down_RD, known_RK = (weight[layer_idx].to(states_BTD.dtype) for weight in (self.down_LRD, self.known_LRK))
        return nn.functional.gelu(states_BTD @ down_RD.T + known_BTK @ known_RK.T)

    def flops_per_token(self) -> int:
        """Count the maps, the bottleneck with what is known, and the update of the memory."""
        width, choices = self.memory_width, len(self.branches)
        known = self.rank * (width + 1) + width * (width + choices)
        return super().flops_per_token() + 2 * self.num_layers * known

    def remember(self, layer_idx: int, choice: Tensor, memory: Any) -> Any:
        """Add the choice, hard [B, T] or soft [B, T, 3], to the memory and take its cost from what is left."""
        carried_BTM, left_BT = memory
        if choice.is_floating_point():
            weights_BTC = choice[..., list(self.branches)].float()
        else:
            weights_BTC = (choice[..., None] == self.values_C).float()
        carried_BTM = torch.tanh(carried_BTM @ self.carry_MM.T + weights_BTC @ self.embed_LCM[layer_idx])
        return carried_BTM, left_BT - weights_BTC @ self.cost_C
