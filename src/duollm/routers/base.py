"""What every router shares: scores turn into soft mixtures in training and into priced choices afterwards.

Shape letters: B batch, T tokens, L layers, C branches of the router, D hidden.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from duollm.flops import layer_parameters
from duollm.models.branch import Branch
from duollm.models.configuration_duo import DuoConfig
from duollm.models.policy import Policy


class Router(nn.Module):
    """A policy that is trained; a new kind only has to give `scores`.

    In training mode a choice is soft, P = softmax(scores / temperature). In evaluation mode it is the branch of
    the highest score less `price` x cost, the costs being those of `branch_costs`: with two branches big
    is taken where it beats the other by more than the price.

    Args:
        config: of the model that is routed.
        branches: the branches it chooses from; big among them.

    Attributes:
        objective: how it is trained, a key of a table in `duollm.routers.objectives`; one that is in
            none is only calibrated.
        every_budget: whether one training serves all budgets, which then differ in the price alone.
        two_branches: whether it cannot choose among three.
        needs_labels: whether it is taught by `duollm.oracle.labels`.
        temperature: of the softmax; annealed by the training.
        price: set by calibration so that the hard choices spend the budget on average.
        exact_price_L: a price for each layer, set by calibration for spending exactly the budget (`ExactBudget`).
    """

    objective: ClassVar[str] = "mixture"
    every_budget: ClassVar[bool] = False
    two_branches: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False
    price: Tensor
    exact_price_L: Tensor
    values_C: Tensor
    cost_C: Tensor

    def __init__(self, config: DuoConfig, branches: Sequence[Branch]) -> None:
        super().__init__()
        self.branches = tuple(Branch(branch) for branch in branches)
        if Branch.BIG not in branches or len(set(branches)) < 2 or list(branches) != sorted(set(branches)):
            raise ValueError(
                "a router needs big and at least one other branch, in ascending order, "
                f"got {[branch.name for branch in self.branches]}"
            )
        if self.two_branches and len(self.branches) != 2:
            name = type(self).__name__
            raise ValueError(f"{name} knows two branches, big and another, got {len(self.branches)}")
        self.num_layers, self.hidden_size = config.num_hidden_layers, config.hidden_size
        self.temperature = 1.0
        self.register_buffer("price", torch.zeros(()))
        self.register_buffer("exact_price_L", torch.zeros(self.num_layers))
        self.register_buffer("values_C", torch.tensor(self.branches), persistent=False)
        self.register_buffer("cost_C", branch_costs(config)[list(self.branches)], persistent=False)

    def scores(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """Return the scores of the branches, [B, T, C], float32, and the memory for the next layer."""
        raise NotImplementedError

    def margin(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """By how much big beats the one other branch, [B, T], and the memory; for two branches only."""
        scores_BTC, memory = self.scores(layer_idx, states_BTD, memory)
        return scores_BTC[..., 1] - scores_BTC[..., 0], memory

    def weigh(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> tuple[Tensor, Tensor, Any]:
        """Return the highest price at which big is still taken, [B, T], the branch taken else, and the memory."""
        if len(self.branches) == 2:
            margin_BT, memory = self.margin(layer_idx, states_BTD, memory)
            return margin_BT, self.values_C[0], memory
        scores_BTC, memory = self.scores(layer_idx, states_BTD, memory)
        other_BT, index_BT = (scores_BTC - self.price * self.cost_C)[..., :-1].max(-1)
        return scores_BTC[..., -1] - other_BT, self.values_C[index_BT], memory

    def mix(self, scores_BTC: Tensor) -> Tensor:
        """Turn scores into weights [B, T, C] that sum to 1; used in training mode."""
        return (scores_BTC / self.temperature).softmax(-1)

    def aim(self, big_layers: int) -> None:
        """Take note of the budget, before it is trained for it or calibrated to it; by default nothing."""

    def begin(self, position_ids_BT: Tensor) -> Any:
        """The memory for layer 0; by default None."""
        return None

    def hold(self, memory: Any, big_layers: int | Tensor) -> Any:
        """Take note, in the memory for layer 0, of how many big layers each token will spend; by default nothing."""
        return memory

    def remember(self, layer_idx: int, choice: Tensor, memory: Any) -> Any:
        """Take note of what was chosen, in the form that `forward` returns it; by default nothing."""
        return memory

    def forward(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """Choose for one layer: weights [B, T, 3] in training mode, integers [B, T] otherwise."""
        choice, memory = self.decide(layer_idx, states_BTD, memory)
        return choice, self.remember(layer_idx, choice, memory)

    def decide(
        self, layer_idx: int, states_BTD: Tensor, memory: Any, price: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """As `forward`, but the memory does not hold the choice yet; with another price of big if one is given."""
        if self.training:
            scores_BTC, memory = self.scores(layer_idx, states_BTD, memory)
            return self.over_all_branches(self.mix(scores_BTC)), memory
        highest_BT, other, memory = self.weigh(layer_idx, states_BTD, memory)
        return torch.where(highest_BT > (self.price if price is None else price), int(Branch.BIG), other), memory

    def flops_per_token(self) -> int:
        """Count the FLOPs of deciding on one token at all layers: a multiplication and an addition per weight.

        A kind overrides this if it does not use each of its weights once per token.
        """
        return 2 * sum(weight.numel() for weight in self.parameters())

    def over_all_branches(self, weights_BTC: Tensor) -> Tensor:
        """Weights of this router's branches as weights of all three, [B, T, 3]."""
        absent = weights_BTC.new_zeros(weights_BTC.shape[:2])
        columns = [weights_BTC[..., self.branches.index(b)] if b in self.branches else absent for b in Branch]
        return torch.stack(columns, dim=-1)


def deciding_flops(policy: Policy) -> int:
    """FLOPs per token of what a policy computes to decide: a router's own; others look things up."""
    return policy.flops_per_token() if isinstance(policy, Router) else 0


def branch_costs(config: DuoConfig) -> Tensor:
    """What each branch costs a token at one layer, [3]: small 0, big 1, skip below 0 by what it saves.

    In units of the FLOPs by which big exceeds small, so the mean cost over a route's layers is its share of
    big layers if none is skipped, and else the share that would cost the same.
    """
    skip, small, big = layer_parameters(config)
    if big == small:
        return torch.tensor([-1.0, 0.0, 1.0])
    return torch.tensor([(skip - small) / (big - small), 0.0, 1.0])
