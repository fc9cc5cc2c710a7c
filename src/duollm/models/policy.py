"""What says which branch each token takes: the protocol that the model calls, and fixed routes.

Shape letters: B batch, T tokens, L layers, C branches (skip, small, big), D hidden.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from .branch import Branch
from .dispatch import Dispatch

Choice = Tensor | Dispatch
"""Integers [B, T], values of `Branch` (hard); floats [B, T, C], weights of the branches (soft); or
tokens already grouped by branch."""


class Policy(Protocol):
    """Says which branch each token takes at each layer."""

    def __call__(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> tuple[Choice, Any]:
        """Choose for one layer.

        Args:
            layer_idx: the layer, 0 first.
            states_BTD: normalised hidden states that enter what is being chosen: the FFN's input
                when skip_scope is "ffn", the layer's when it is "layer".
            memory: what the previous layer's call returned. At layer 0 of every forward: what the
                policy's `begin(position_ids_BT)` returned, if it has that method, else None.
        """
        ...


class FixedRoutes:
    """Policy that follows given routes, integers [L] or [B, T, L]."""

    def __init__(self, routes: Tensor) -> None:
        self.routes = routes
        self.branches = [Branch(branch) for branch in routes.tolist()] if routes.ndim == 1 else None
        if routes.ndim > 1:  # of all layers at once: a GPU is waited for once per forward, not once per layer
            self.counts_L3 = torch.stack([(routes == branch).sum((0, 1)) for branch in Branch], dim=-1).tolist()

    def __call__(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> tuple[Choice, Any]:
        """Return the given choice of this layer."""
        if self.branches is not None:
            return Dispatch.uniform(self.branches[layer_idx], states_BTD.shape[:2].numel()), None
        choice_BT = self.routes[..., layer_idx].to(states_BTD.device)
        return Dispatch.from_choice(choice_BT, self.counts_L3[layer_idx]), None


def check_routes(routes: Any, batch: int, tokens: int, num_layers: int) -> Tensor:
    """Return routes as an integer tensor, or raise a ValueError that says what is allowed."""
    routes = torch.as_tensor(routes)
    allowed = f"integers of shape [{num_layers}] or [{batch}, {tokens}, {num_layers}]"
    if routes.is_floating_point() or routes.dtype == torch.bool:
        raise ValueError(f"routes must be {allowed}, got dtype {routes.dtype}")
    if tuple(routes.shape) not in ((num_layers,), (batch, tokens, num_layers)):
        raise ValueError(f"routes must be {allowed}, got shape {list(routes.shape)}")
    lowest, highest = (end.item() for end in torch.aminmax(routes)) if routes.numel() else (0, 0)
    if lowest < min(Branch) or highest > max(Branch):
        raise ValueError(
            f"routes may hold only {', '.join(f'{branch.name}={branch.value}' for branch in Branch)}, "
            f"got values {lowest} .. {highest}"
        )
    return routes.long()
