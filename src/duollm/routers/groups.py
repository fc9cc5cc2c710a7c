"""Policies of models whose layers vary in groups: one decision for a whole group, at its first layer.

Shape letters: B batch, T tokens, D hidden.
"""

from typing import Any

from torch import Tensor, nn

from duollm.measure.executor import deciding_flops
from duollm.models.policy import Choice, Policy
from duollm.routes.space import RouteSpace


class ByGroup(nn.Module):
    """Asks a policy at the first layer of every group. The other layers follow, and fixed layers take their branch.

    The memory holds the policy's own memory and the choices of the groups so far.
    """

    def __init__(self, policy: Policy, space: RouteSpace) -> None:
        super().__init__()
        self.policy, self.space = policy, space
        self.leader_of = {layer: layers[0] for layers in space.group_layers for layer in layers}

    def begin(self, position_ids_BT: Tensor) -> tuple[Any, dict[int, Choice]]:
        """Return the memory for layer 0."""
        begin = getattr(self.policy, "begin", None)
        return begin and begin(position_ids_BT), {}

    def forward(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> tuple[Choice, Any]:
        """Return the choice of the layer's group, or the branch to which the layer is fixed."""
        if layer_idx in self.space.fixed:
            return self.space.fixed[layer_idx], memory
        inner, taken = memory
        leader = self.leader_of[layer_idx]
        if leader != layer_idx:
            return taken[leader], memory
        choice, inner = self.policy(layer_idx, states_BTD, inner)
        return choice, (inner, taken | {layer_idx: choice})

    def flops_per_token(self) -> int:
        """Count what the policy counts."""
        return deciding_flops(self.policy)


def by_group(policy: Policy, space: RouteSpace) -> Policy:
    """Return the policy, held to one decision per group where layers vary in groups or are fixed."""
    return policy if space.by_layer else ByGroup(policy, space)
