"""The paper's router: one linear map per layer (paper, section 5), its straight-through variant, and one distilled.

Shape letters: B batch, T tokens, L layers, C branches of the router, D hidden.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from duollm.models.branch import Branch
from duollm.models.configuration_duo import DuoConfig
from duollm.routers.base import Router


class LinearRouter(Router):
    """Scores the branches of each layer by a linear map of the hidden states.

    Args:
        inputs: of each map, where a kind gives it more than the D numbers of the states.
    """

    def __init__(self, config: DuoConfig, branches: Sequence[Branch], inputs: int | None = None) -> None:
        super().__init__(config, branches)
        self.inputs = inputs or self.hidden_size
        self.weight_LCD = nn.Parameter(torch.zeros(self.num_layers, len(self.branches), self.inputs))
        self.bias_LC = nn.Parameter(torch.zeros(self.num_layers, len(self.branches)))

    def scores(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """Return the scores of the branches, [B, T, C], float32."""
        weight_CD = self.weight_LCD[layer_idx].to(states_BTD.dtype)
        return nn.functional.linear(states_BTD, weight_CD).float() + self.bias_LC[layer_idx], memory

    def margin(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """By how much big beats the one other branch, [B, T]: one product with the difference of the two maps."""
        (other_D, big_D), (other, big) = self.weight_LCD[layer_idx], self.bias_LC[layer_idx]
        return (states_BTD @ (big_D - other_D).to(states_BTD.dtype)).float() + (big - other), memory

    def flops_per_token(self) -> int:
        """Count one product per layer with the difference of two maps, or one per branch if there are three."""
        return 2 * self.num_layers * self.maps_in_use * self.inputs

    @property
    def maps_in_use(self) -> int:
        """Maps of a layer that a decision takes; two branches need only their difference."""
        return 1 if len(self.branches) == 2 else len(self.branches)


class GumbelRouter(LinearRouter):
    """A linear router that draws hard choices in training: Gumbel softmax, straight through (Jang et al., 2017).

    The forward pass takes one branch per token, as in use; the gradient is that of the soft mixture.
    """

    def mix(self, scores_BTC: Tensor) -> Tensor:
        """Draw one-hot weights [B, T, C] that pass the gradient of the softmax of the perturbed scores."""
        return nn.functional.gumbel_softmax(scores_BTC, self.temperature, hard=True)


class DistilledRouter(GumbelRouter):
    """A linear router that first imitates the oracle's soft choices (`duollm.routers.distilled`), then fine-tunes."""

    objective = "distillation"
    needs_labels = True
