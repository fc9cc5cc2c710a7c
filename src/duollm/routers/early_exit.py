"""Early exit by confidence (CALM: Schuster et al., 2022), a baseline that routers have to beat.

Shape letters: B batch, T tokens, L layers, D hidden.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from duollm.models.branch import Branch
from duollm.models.configuration_duo import DuoConfig
from duollm.routers.base import Listener, Router, RouterTraining
from duollm.training.loop import LossFn


class EarlyExitRouter(Router):
    """Takes big until the model is sure, then the other branch in all later layers.

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
