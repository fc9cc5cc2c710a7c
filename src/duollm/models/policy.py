"""Policies say which branch each token takes: the protocol that the model calls, and fixed routes.

Shape letters: B batch, T tokens, L layers, C branches (skip, small, big), D hidden.
"""

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .branch import BRANCHES, Branch
from .compat import without_values
from .dispatch import Dispatch

Choice = Tensor | Dispatch | Branch
"""Integers [B, T], values of `Branch` (hard); floats [B, T, C], weights of the branches (soft); tokens
already grouped by branch; or one branch for all tokens."""


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


class AllBig:
    """Policy that sends every token through the big FFNs: the model is then a dense one."""

    def __call__(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> tuple[Choice, Any]:
        """Choose big."""
        return Branch.BIG, None


class FixedRoutes:
    """Policy that follows given routes, integers [L] or [B, T, L]."""

    counts_L3: list[list[int]] | None = None  # tokens of each branch, unless one branch each is all there is

    def __init__(self, routes: Tensor) -> None:
        self.routes = routes
        self.branches: list[Branch | None] = [None] * routes.shape[-1]  # that all tokens of a layer take
        if without_values(routes):
            return
        tokens = routes.shape[:-1].numel()  # 1 for routes [L]
        if tokens == 1:
            self.branches = [Branch(branch) for branch in routes.flatten().tolist()]
        else:  # of all layers at once: a GPU is waited for once per forward, not once per layer
            self.counts_L3 = torch.stack([(routes == branch).sum((0, 1)) for branch in BRANCHES], dim=-1).tolist()
            self.branches = [Branch(each.index(tokens)) if tokens in each else None for each in self.counts_L3]

    def __call__(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> tuple[Choice, Any]:
        """Return the given choice of this layer."""
        branch = self.branches[layer_idx]
        if branch is not None:
            return branch, None
        choice_BT = self.routes[..., layer_idx].to(states_BTD.device).expand(states_BTD.shape[:2])
        if self.counts_L3 is None:
            return choice_BT, None
        return Dispatch.from_choice(choice_BT, self.counts_L3[layer_idx]), None


def choice_tensors(choices: Iterable[Choice], shape: torch.Size, device: torch.device) -> tuple[Tensor, ...]:
    """Return the choices of all layers as tensors, [B, T] or soft [B, T, C], for gathering, exporting and saving."""
    full: dict[Branch, Tensor] = {}  # shared by the layers
    tensors = []
    for choice in choices:
        if isinstance(choice, Branch):
            if choice not in full:
                full[choice] = torch.full(shape, choice.value, device=device)
            choice = full[choice]
        tensors.append(choice.choice_N(device).view(shape) if isinstance(choice, Dispatch) else choice)
    return tuple(tensors)


def choice_weights(choice: Choice, states_BTD: Tensor) -> Tensor:
    """Return the choice as weights [B, T, C]. Hard choices become one-hot."""
    (tensor,) = choice_tensors([choice], states_BTD.shape[:2], states_BTD.device)
    return tensor if tensor.is_floating_point() else nn.functional.one_hot(tensor, len(Branch)).to(states_BTD.dtype)


def check_routes(routes: Any, batch: int, tokens: int, num_layers: int) -> Tensor:
    """Return routes as an integer tensor, or raise a ValueError that says what is allowed."""
    routes = torch.as_tensor(routes)
    allowed = f"integers of shape [{num_layers}] or [{batch}, {tokens}, {num_layers}]"
    if routes.is_floating_point() or routes.dtype == torch.bool:
        raise ValueError(f"routes must be {allowed}, got dtype {routes.dtype}")
    if tuple(routes.shape) not in ((num_layers,), (batch, tokens, num_layers)):
        raise ValueError(f"routes must be {allowed}, got shape {list(routes.shape)}")
    if without_values(routes):
        return routes.long()
    lowest, highest = (end.item() for end in torch.aminmax(routes)) if routes.numel() else (0, 0)
    if lowest < min(Branch) or highest > max(Branch):
        raise ValueError(
            f"routes may hold only {', '.join(f'{branch.name}={branch.value}' for branch in Branch)}, "
            f"got values {lowest} .. {highest}"
        )
    return routes.long()
