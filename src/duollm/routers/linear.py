"""The paper's router: one linear map per layer (paper, section 5), and its straight-through variant.

Shape letters: B batch, T tokens, L layers, C branches of the router, D hidden, F inputs of a layer's map.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gumbel_softmax, linear

from duollm.models.branch import Branch
from duollm.models.configuration_duo import DuoConfig
from duollm.routers.base import Router


class LinearRouter(Router):
    """Scores the branches of each layer by a linear map of the hidden states.

    Args:
        inputs: number of inputs of each map, if a kind gives it more than the D numbers of the states.
    """

    def __init__(self, config: DuoConfig, branches: Sequence[Branch], inputs: int | None = None) -> None:
        super().__init__(config, branches)
        self.inputs = inputs or self.hidden_size
        self.weight_LCD = nn.Parameter(torch.zeros(self.num_layers, len(self.branches), self.inputs))
        self.bias_LC = nn.Parameter(torch.zeros(self.num_layers, len(self.branches)))

    def inputs_of(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> Tensor:
        """Return the inputs of a layer's map, [B, T, inputs]; by default the states."""
        return states_BTD

    def scores(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """Return the scores of the branches, [B, T, C], float32."""
        inputs_BTF, weight_CF = self.inputs_of(layer_idx, states_BTD, memory), self.weight_LCD[layer_idx]
        return linear(inputs_BTF, weight_CF.to(states_BTD.dtype)).float() + self.bias_LC[layer_idx], memory

    def margin(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> tuple[Tensor, Tensor, Any]:
        """Compute the margin; two branches need only one product, with the difference of their maps."""
        if len(self.branches) > 2:
            return super().margin(layer_idx, states_BTD, memory)
        inputs_BTF = self.inputs_of(layer_idx, states_BTD, memory)
        (other_F, big_F), (other, big) = self.weight_LCD[layer_idx], self.bias_LC[layer_idx]
        margin_BT = (inputs_BTF @ (big_F - other_F).to(states_BTD.dtype)).float() + (big - other)
        return margin_BT, self.values_C[0], memory

    def flops_per_token(self) -> int:
        """Count one product per layer with the difference of two maps, or one per branch if there are three."""
        maps = 1 if len(self.branches) == 2 else len(self.branches)
        return 2 * self.num_layers * maps * self.inputs


class GumbelRouter(LinearRouter):
    """A linear router that draws hard choices in training: straight-through Gumbel softmax (Jang et al., 2017).

    The forward pass takes one branch per token, as in use. The gradient is that of the soft mixture.
    """

    def mix(self, scores_BTC: Tensor) -> Tensor:
        """Draw one-hot weights [B, T, C] whose gradient is that of the softmax of the perturbed scores."""
        return gumbel_softmax(scores_BTC, self.temperature, hard=True)
