"""Loss regression: routers that predict by how many nats the big branch lowers the loss, layer by layer.

Their targets are the marginal gains of every token and layer (`duollm.routers.marginal`). A token takes big where the
gain exceeds the price, so one training serves every budget.

Shape letters: B batch, T tokens, L layers, C branches of the router, D hidden, R rank, E = C + R.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from duollm.models.branch import Branch
from duollm.models.configuration_duo import DuoConfig
from duollm.routers.base import Router, RouterTraining
from duollm.routers.linear import LinearRouter
from duollm.routers.marginal import GAIN_SCALE, RouterGates, centred
from duollm.training.loop import LossFn


class GainRegression(Router):
    """A router whose scores are the gains of its branches; one training serves every budget.

    Attributes:
        off_policy: whether gains are measured with all layers big instead of along the router's own routes.
    """

    settings = ()
    every_budget = True
    joint = False
    predicts_gains = True
    off_policy: ClassVar[bool] = False

    def loss_fn(self, training: RouterTraining) -> LossFn:
        """Return the squared error of predicted gains, along routes that the router itself would take (`RouterGates`).

        The mean over the router's branches is subtracted from the gains, because only differences decide.
        """
        model, steps = training.model, training.trainer.plan.steps
        generator = torch.Generator(model.device)

        def loss_fn(batch_BT: Tensor, step: int, part: int) -> tuple[Tensor, dict[str, float]]:
            generator.manual_seed(training.seed_of(step, part))
            gates = RouterGates(self, batch_BT, generator, self.off_policy)
            gain_JBTC, nll = gates.measure(model, batch_BT, step / steps, training.patterns)
            gain_JBTC = gain_JBTC * GAIN_SCALE
            predicted_JBTC = torch.stack(gates.scores_JBTC)[:, :, :-1]
            loss = (centred(predicted_JBTC) - centred(gain_JBTC)).square().sum(-1).mean()
            return loss, {"nll": nll, "gain_variance": gain_JBTC.var().item()}

        return loss_fn


class GainsRouter(GainRegression, LinearRouter):
    """A linear map per layer, fitted to marginal gains."""


class OffPolicyGainsRouter(GainsRouter):
    """`GainsRouter` with labels of the kind "all other layers run big", which are not those of its own routes."""

    off_policy = True


class DeepGainsRouter(GainRegression):
    """`GainsRouter` with a bottleneck beside the linear map: D -> R -> C per layer, GELU.

    One product with `weight_LED` gives both the linear map's scores and the bottleneck's input. When one token is
    decoded at a time, the cost of a decision depends on the number of operations, not on their size.
    """

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
        """Count the products with both maps."""
        return 2 * (self.weight_LED.numel() + self.up_LCR.numel()) * len(self.space.leaders) // self.num_layers
