"""The paper's router: one linear map per layer, a softmax with temperature, a budget (paper, section 5).

Shape letters: B batch, T tokens, L layers, C branches of the router, D hidden.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from duollm.models.branch import Branch


class LinearRouter(nn.Module):
    """Scores the branches of each layer by a linear map of the hidden states.

    In training mode it mixes softly, P = softmax(scores / temperature); in evaluation mode it takes
    the branch of highest score, where big has to win by more than `threshold`.

    Args:
        num_layers, hidden_size: of the model.
        branches: the branches it chooses from; big among them.

    Attributes:
        temperature: annealed by the training from soft to hard.
        threshold: set by calibration so that the hard big share meets the budget.
    """

    threshold: Tensor
    values: Tensor

    def __init__(self, num_layers: int, hidden_size: int, branches: Sequence[Branch]) -> None:
        super().__init__()
        if Branch.BIG not in branches:
            raise ValueError(f"a router needs big among its branches, got {[Branch(each).name for each in branches]}")
        self.branches = tuple(Branch(branch) for branch in branches)
        self.weight_LCD = nn.Parameter(torch.zeros(num_layers, len(self.branches), hidden_size))
        self.bias_LC = nn.Parameter(torch.zeros(num_layers, len(self.branches)))
        self.temperature = 1.0
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("values", torch.tensor(self.branches), persistent=False)

    def scores(self, layer_idx: int, states_BTD: Tensor) -> Tensor:
        """Scores of the branches, [B, T, C], float32."""
        weight_CD = self.weight_LCD[layer_idx]
        return nn.functional.linear(states_BTD, weight_CD.to(states_BTD.dtype)).float() + self.bias_LC[layer_idx]

    def margin(self, layer_idx: int, states_BTD: Tensor) -> Tensor:
        """By how much big beats the best other branch, [B, T]; big is taken where it exceeds the threshold."""
        big = self.branches.index(Branch.BIG)
        if len(self.branches) == 2:  # one product per token, with the difference of the two maps
            weight_CD, bias_C = self.weight_LCD[layer_idx], self.bias_LC[layer_idx]
            direction_D = (weight_CD[big] - weight_CD[1 - big]).to(states_BTD.dtype)
            return (states_BTD @ direction_D).float() + (bias_C[big] - bias_C[1 - big])
        scores_BTC = self.scores(layer_idx, states_BTD)
        others = [index for index in range(len(self.branches)) if index != big]
        return scores_BTC[..., big] - scores_BTC[..., others].amax(-1)

    def forward(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """Choose for one layer: weights [B, T, 3] in training mode, integers [B, T] otherwise."""
        if self.training:
            scores_BTC = self.scores(layer_idx, states_BTD)
            weights_BTC = (scores_BTC / self.temperature).softmax(-1)
            absent = weights_BTC.new_zeros(weights_BTC.shape[:2])
            columns = [weights_BTC[..., self.branches.index(b)] if b in self.branches else absent for b in Branch]
            return torch.stack(columns, dim=-1), None
        if len(self.branches) == 2:
            other = next(branch for branch in self.branches if branch != Branch.BIG)
            wins_BT = self.margin(layer_idx, states_BTD) > self.threshold
            return torch.where(wins_BT, int(Branch.BIG), int(other)), None
        scores_BTC = self.scores(layer_idx, states_BTD)
        scores_BTC[..., self.branches.index(Branch.BIG)] -= self.threshold
        return self.values[scores_BTC.argmax(-1)], None


def budget_loss(weights: Sequence[Tensor], budget: float) -> Tensor:
    """Mean over sequences of (mean big share over layers and tokens - budget)^2 (paper, section 5).

    Across layers, not per layer: layers may differ as long as the mean holds.

    Args:
        weights: per layer the soft choices [B, T, 3].
        budget: wanted share of big, 0 .. 1.
    """
    share_B = torch.stack([each[..., Branch.BIG].mean(-1) for each in weights]).mean(0)
    return (share_B - budget).square().mean()
