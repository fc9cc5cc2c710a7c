"""Loss regression: a router that predicts by how many nats the big branch lowers the loss, layer by layer.

Its target is the marginal gain of every token and layer, which one backward pass gives for all of them at once:
with gate weights w on the branches, -dL/dw is to first order what a branch is worth there, to this token's loss
and to those that attend to it (`duollm.routers.gains_training.gains_loss`). Big is then taken where it is worth more
than the price, so one training serves every budget.

Shape letters: B batch, T tokens, L layers, C branches of the router, D hidden, R rank, E = C + R.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from duollm.models.branch import Branch
from duollm.models.configuration_duo import DuoConfig
from duollm.routers.base import Router
from duollm.routers.linear import LinearRouter

GAIN_SCALE = 100.0
"""Scores and price are in nats x this: gains are hundredths of nats, so the weights are of ordinary size."""


class GainsRouter(LinearRouter):
    """A linear map per layer, fitted to marginal gains."""

    objective = "gains"
    every_budget = True


class DeepGainsRouter(Router):
    """As `GainsRouter`, with a bottleneck beside the linear map: D -> R -> C per layer, GELU.

    One product with `weight_LED` gives the linear map's scores and the bottleneck's input: where one token is
    decoded at a time, what a decision costs is how many operations it takes, whatever their size.
    """

    objective = "gains"
    every_budget = True
    rank = 16

    def __init__(self, config: DuoConfig, branches: Sequence[Branch]) -> None:
        super().__init__(config, branches)
        choices = len(self.branches)
        self.weight_LED = nn.Parameter(torch.zeros(self.num_layers, choices + self.rank, self.hidden_size))
        self.bias_LE = nn.Parameter(torch.zeros(self.num_layers, choices + self.rank))
        self.up_LCR = nn.Parameter(torch.zeros(self.num_layers, choices, self.rank))
        nn.init.normal_(self.weight_LED.data[:, choices:], std=self.hidden_size**-0.5)

    def scores(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """Return the scores of the branches, [B, T, C], float32."""
        weight_ED, bias_E = (each[layer_idx].to(states_BTD.dtype) for each in (self.weight_LED, self.bias_LE))
        mapped_BTE = linear(states_BTD, weight_ED, bias_E).float()
        direct_BTC, inner_BTR = mapped_BTE.split([len(self.branches), self.rank], dim=-1)
        inner_BTR = gelu(inner_BTR, approximate="tanh")  # "none" takes five times as long on a CPU for one token
        return direct_BTC + linear(inner_BTR, self.up_LCR[layer_idx]), memory

    def flops_per_token(self) -> int:
        """Count the products with the two maps."""
        return 2 * (self.weight_LED.numel() + self.up_LCR.numel())
