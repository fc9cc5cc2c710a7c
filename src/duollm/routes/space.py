"""Routes and their integer ids (no torch needed to import this file).

Shape letters: L layers, R routes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from duollm.models.branch import Branch

if TYPE_CHECKING:
    import torch

Integers = TypeVar("Integers", NDArray[np.int64], "torch.Tensor")

_LARGEST_ID = 2**63 - 1

LARGEST_LISTED = 2**22
"""A space of more routes is never listed whole."""


@dataclass(frozen=True)
class RouteSpace:
    """All routes over `num_layers` layers that use only `branches`.

    A route's id is a number in base C = len(branches): layer 0 is the most significant digit, and
    the digits count the branches in ascending order. Arrays may be NumPy or torch. The result has the type and the
    device of the argument.
    """

    num_layers: int
    branches: tuple[Branch, ...] = (Branch.SMALL, Branch.BIG)

    def __post_init__(self) -> None:
        if self.num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {self.num_layers}")
        branches = tuple(Branch(branch) for branch in self.branches)
        if len(branches) < 2 or list(branches) != sorted(set(branches)):
            raise ValueError(
                f"branches must be two or three different ones in ascending order, "
                f"got {[branch.name for branch in branches]}"
            )
        if len(branches) ** self.num_layers - 1 > _LARGEST_ID:
            raise ValueError(
                f"{len(branches)}^{self.num_layers} routes do not fit 64-bit ids; use fewer layers or branches"
            )
        object.__setattr__(self, "branches", branches)

    @property
    def base(self) -> int:
        """Number of branches, C."""
        return len(self.branches)

    @property
    def size(self) -> int:
        """Number of routes, R = C^L."""
        return int(self.base**self.num_layers)

    @cached_property
    def _place_values_L(self) -> NDArray[np.int64]:
        return self.base ** np.arange(self.num_layers - 1, -1, -1, dtype=np.int64)

    def decode(self, ids: Integers) -> Integers:
        """Turn ids [...] into routes [..., L], values of `Branch`.

        Raises:
            ValueError: an id is outside 0 .. size - 1.
        """
        array = _as_numpy(ids)
        if array.size and (array.min() < 0 or array.max() >= self.size):
            raise ValueError(f"route ids must be in 0 .. {self.size - 1}, got {array.min()} .. {array.max()}")
        digits = array[..., None] // self._place_values_L % self.base
        return _like(np.asarray(self.branches, dtype=np.int64)[digits], ids)

    def encode(self, routes: Integers) -> Integers:
        """Turn routes [..., L], values of `Branch`, into ids [...].

        Raises:
            ValueError: the number of layers is wrong, or a branch is not in this space.
        """
        array = _as_numpy(routes)
        if array.ndim == 0 or array.shape[-1] != self.num_layers:
            raise ValueError(f"routes must end in a dimension of {self.num_layers} layers, got shape {array.shape}")
        digit_of = np.full(len(Branch), -1, dtype=np.int64)
        digit_of[list(self.branches)] = np.arange(self.base)
        in_range = (array >= 0) & (array < len(Branch))
        digits = np.where(in_range, digit_of[np.where(in_range, array, 0)], -1)
        if (digits < 0).any():
            allowed = ", ".join(f"{branch.name}={branch.value}" for branch in self.branches)
            raise ValueError(f"routes may hold only {allowed}; got {np.unique(array[digits < 0]).tolist()}")
        return _like((digits * self._place_values_L).sum(-1), routes)

    def ids_with(self, big: int) -> NDArray[np.int64]:
        """Return the ids, ascending, of all routes with exactly `big` big layers.

        Raises:
            ValueError: no route has that many big layers, or the space is too large to list.
        """
        check_big_layers(self, big)
        if self.size > LARGEST_LISTED:
            raise ValueError(
                f"{self.base}^{self.num_layers} routes are too many to list; "
                "draw some with duollm.routes.sampling.draw_route_ids"
            )
        return np.flatnonzero(self.count_big(np.arange(self.size)) == big)

    def count_big(self, ids: Integers) -> Integers:
        """Return the number of big layers of routes [...], int64."""
        routes_L = self.decode(_as_numpy(ids))
        return _like((routes_L == Branch.BIG).sum(-1), ids)


def check_big_layers(space: RouteSpace, big: int) -> None:
    """Raise ValueError unless some route of `space` has exactly `big` big layers."""
    most = space.num_layers if Branch.BIG in space.branches else 0
    least = space.num_layers if space.branches == (Branch.BIG,) else 0
    if not least <= big <= most:
        raise ValueError(f"a budget of {big} big layers is impossible here; allowed: {least} .. {most}")


def focus_budgets(num_layers: int) -> tuple[int, int, int]:
    """Return the low, middle and high budget: the paper's 4, 6 and 8 of 12, scaled to the depth."""
    return round(num_layers / 3), round(num_layers / 2), round(2 * num_layers / 3)


def parse_branches(names: Sequence[str]) -> tuple[Branch, ...]:
    """Turn names such as ["small", "big"] into branches, ascending."""
    return tuple(sorted(Branch[name.upper()] for name in names))


def _as_numpy(given: Any) -> NDArray[np.int64]:
    return np.asarray(given.cpu() if hasattr(given, "cpu") else given, dtype=np.int64)


def _like(array: NDArray[np.int64], given: Any) -> Any:
    """Return `array` as the kind of array that was given."""
    if not hasattr(given, "cpu"):
        return array
    import torch

    return torch.as_tensor(array, device=given.device)
