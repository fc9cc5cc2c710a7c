"""Spending exactly k big layers on every token, whatever the router would like.

Shape letters: B batch, T tokens, L layers.
"""

from typing import Any

import torch
from torch import Tensor, nn

from duollm.models.branch import Branch
from duollm.routers.base import Router


class ExactBudget(nn.Module):
    """A hard router held to exactly `big_layers` big layers per token.

    The router decides, at a price of each layer, as long as there is a choice: a token that has spent its k and would
    take big gets the dearest of the router's other branches, and one that has as many layers before it as big layers
    left takes big.
    """

    def __init__(self, router: Router, big_layers: int) -> None:
        super().__init__()
        if not 0 <= big_layers <= router.num_layers:
            raise ValueError(f"big_layers must be in 0 .. {router.num_layers}, got {big_layers}")
        self.router, self.big_layers = router, big_layers
        self.otherwise = int(max(branch for branch in router.branches if branch != Branch.BIG))

    def begin(self, position_ids_BT: Tensor) -> Any:
        """The memory for layer 0: the router's, which is told of the budget, and what each token has left."""
        inner = self.router.hold(self.router.begin(position_ids_BT), self.big_layers)
        return inner, torch.full_like(position_ids_BT, self.big_layers)

    def forward(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """Choose for one layer, integers [B, T]; the memory is of the kind that `begin` returns."""
        inner, left_BT = memory
        price = self.price(layer_idx, states_BTD, memory)
        choice_BT, inner = self.router.decide(layer_idx, states_BTD, inner, price)
        choice_BT = choice_BT.masked_fill((left_BT == 0) & (choice_BT == Branch.BIG), self.otherwise)
        choice_BT = choice_BT.masked_fill(left_BT == self.router.num_layers - layer_idx, int(Branch.BIG))
        inner = self.router.remember(layer_idx, choice_BT, inner)
        return choice_BT, (inner, left_BT - (choice_BT == Branch.BIG).long())

    def price(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> Tensor:
        """The price of big at a layer, a scalar."""
        return self.router.exact_price_L[layer_idx]

    def flops_per_token(self) -> int:
        """Count the router's; the rest is a few integers per token."""
        return self.router.flops_per_token()
