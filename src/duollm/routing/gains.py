"""Loss regression: a router that predicts by how many nats the big branch lowers the loss, layer by layer.

Its target is the marginal gain of every token and layer, which one backward pass gives for all of them at once:
with gate weights w on the branches, -dL/dw is to first order what a branch is worth there, to this token's loss
and to those that attend to it (`duollm.train.gains.gains_loss`). Big is then taken where it is worth more
than the price, so one training serves every budget.

Shape letters: B batch, T tokens, L layers, C branches of the router, D hidden, R rank.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from duollm.models.branch import Branch
from duollm.models.configuration_duo import DuoConfig
from duollm.routing.linear import LinearRouter


class GainsRouter(LinearRouter):
    """A linear map per layer, fitted to marginal gains. Scores and price are in nats x `scale`."""

    objective = "gains"
    every_budget = True
    scale = 100.0  # gains are hundredths of nats: this makes the weights of ordinary size


class DeepGainsRouter(GainsRouter):
    """As `GainsRouter`, with a bottleneck beside the linear map: D -> R -> C per layer, GELU."""

    rank = 16

    def __init__(self, config: DuoConfig, branches: Sequence[Branch]) -> None:
        super().__init__(config, branches)
        down_LRD = torch.randn(self.num_layers, self.rank, self.hidden_size) * self.hidden_size**-0.5
        self.down_LRD = nn.Parameter(down_LRD)
        self.up_LCR = nn.Parameter(torch.zeros(self.num_layers, len(self.branches), self.rank))

    def scores(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """Return the scores of the branches, [B, T, C], float32."""
        linear_BTC, memory = super().scores(layer_idx, states_BTD, memory)
        up_CR = self.up_LCR[layer_idx].to(states_BTD.dtype)
        return linear_BTC + (self.narrow(layer_idx, states_BTD, memory) @ up_CR.T).float(), memory

    def margin(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """By how much big beats the one other branch, [B, T]."""
        linear_BT, memory = super().margin(layer_idx, states_BTD, memory)
        narrow_BTR, (other_R, big_R) = self.narrow(layer_idx, states_BTD, memory), self.up_LCR[layer_idx]
        return linear_BT + (narrow_BTR @ (big_R - other_R).to(states_BTD.dtype)).float(), memory

    def flops_per_token(self) -> int:
        """Count the linear map and the bottleneck."""
        bottleneck = self.rank * (self.hidden_size + self.maps_in_use)
        return super().flops_per_token() + 2 * self.num_layers * bottleneck

    def narrow(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> Tensor:
        """The bottleneck's activations, [B, T, R]."""
        return nn.functional.gelu(states_BTD @ self.down_LRD[layer_idx].to(states_BTD.dtype).T)
