"""A router that picks, early and once, one of a few whole routes.

Shape letters: B batch, T tokens, L layers, C branches of the router, D hidden, R routes of the codebook.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from duollm.models.branch import Branch
from duollm.models.configuration_duo import DuoConfig
from duollm.routers.base import Router, branch_costs
from duollm.routes.space import RouteSpace


class CodebookRouter(Router):
    """Predicts each route's loss by a linear map of the states at layer `decide_at` and takes the lowest.

    The layers before are the same in all routes. Predictions count with `price` for each big layer, so routes of
    neighbouring budgets meet the budget on average. Tokens of one route form a cohort that is known from
    `decide_at` on. The memory is the index of the route taken; before that, the exact number of big layers if
    there is one.

    Attributes:
        routes_RL: the codebook, `MOST_ROUTES` rows; a row of bias -inf is not in use.
    """

    objective = "codebook"
    needs_labels = True
    routes_RL: Tensor
    branch_cost_3: Tensor

    def __init__(self, config: DuoConfig, branches: Sequence[Branch]) -> None:
        super().__init__(config, branches)
        space = RouteSpace(self.num_layers, self.branches)
        spread_R = torch.linspace(0, 1, MOST_ROUTES, dtype=torch.float64) * (space.size - 1)
        self.decide_at = 0
        self.register_buffer("routes_RL", space.decode(spread_R.long()))
        self.register_buffer("branch_cost_3", branch_costs(config), persistent=False)
        self.weight_RD = nn.Parameter(torch.zeros(MOST_ROUTES, self.hidden_size))
        self.bias_R = nn.Parameter(torch.zeros(MOST_ROUTES))

    def get_extra_state(self) -> Tensor:
        """`decide_at`, to be saved with the weights."""
        return torch.tensor(self.decide_at)

    def set_extra_state(self, state: Any) -> None:
        """Restore `decide_at`."""
        self.decide_at = int(state)

    def hold(self, memory: Any, big_layers: int | Tensor) -> Any:
        """Choose among the routes with exactly so many big layers, if the codebook has any."""
        return big_layers

    def worth(self, states_BTD: Tensor, exactly: Any) -> Tensor:
        """How far each route's predicted loss lies below the mean, less what it costs, nats [B, T, R]."""
        predicted_BTR = nn.functional.linear(states_BTD, self.weight_RD.to(states_BTD.dtype)).float()
        worth_BTR = predicted_BTR + self.bias_R - self.price * self.branch_cost_3[self.routes_RL].sum(-1)
        if exactly is None:
            return worth_BTR
        wrong_R = (self.routes_RL == Branch.BIG).sum(-1) != exactly
        none_left = (wrong_R | self.bias_R.isinf()).all()
        return worth_BTR.masked_fill(wrong_R & ~none_left, -torch.inf)

    def flops_per_token(self) -> int:
        """Count one product per route in use, at one layer."""
        return 2 * int(self.bias_R.isfinite().sum()) * self.hidden_size

    def decide(
        self, layer_idx: int, states_BTD: Tensor, memory: Any, price: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """Choose for one layer: weights [B, T, 3] in training mode, else integers [B, T] whatever the layer's price."""
        if self.training:
            return super().decide(layer_idx, states_BTD, memory)
        if layer_idx < self.decide_at:
            return self.routes_RL[0, layer_idx].expand(states_BTD.shape[:2]), memory
        if layer_idx == self.decide_at:
            memory = self.worth(states_BTD, memory).argmax(-1)
        return self.routes_RL[:, layer_idx][memory], memory

    def weigh(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> tuple[Tensor, Tensor, Any]:
        """Price 0 everywhere: routes of exactly k big layers are chosen whole, without a price per layer."""
        choice_BT, memory = self.decide(layer_idx, states_BTD, memory)
        return states_BTD.new_zeros(choice_BT.shape), choice_BT, memory

    def scores(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """Scores [B, T, C] whose softmax is each branch's share of the routes' softmax; the memory is their worth."""
        if layer_idx < self.decide_at:
            taken_C = self.routes_RL[0, layer_idx] == self.values_C
            return torch.where(taken_C, 0.0, -torch.inf).expand(*states_BTD.shape[:2], -1), memory
        worth_BTR = self.worth(states_BTD, memory) if layer_idx == self.decide_at else memory
        other_RC = self.routes_RL[:, layer_idx, None] != self.values_C
        tempered_BTRC = (worth_BTR / self.temperature)[..., None].masked_fill(other_RC, -torch.inf)
        return tempered_BTRC.logsumexp(-2) * self.temperature, worth_BTR


MOST_ROUTES = 32
"""Rows of a codebook."""
