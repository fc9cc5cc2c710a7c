"""Routes and their integer ids (no torch needed to import this file).

Shape letters: L layers, J groups of layers, R routes.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from duollm.models.branch import Branch

if TYPE_CHECKING:
    import torch

Integers = TypeVar("Integers", NDArray[np.int64], "torch.Tensor")

_LARGEST_ID = 2**63 - 1

_EASILY_SEARCHED = 2**12

LARGEST_LISTED = 2**22
"""A space of more routes is never listed whole."""


@dataclass(frozen=True)
class RouteSpace:
    """All routes over `num_layers` layers that use only `branches`.

    Layers may vary in groups: all layers of a group take the same branch. A route's id is a number in base
    C = len(branches) with a digit for each group. The group with the first layer is the most significant digit, and the
    digits count the branches in ascending order. Arrays may be NumPy or torch. The result has the type and the device
    of the argument.

    Args:
        groups: the layers of every group, or a number of groups of consecutive layers, as equal as can be. Default:
            every layer is a group of its own.
        fixed: the branches of layers that do not vary. They belong to no group, and may take any branch.

    Raises:
        ValueError: the groups and the fixed layers do not cover every layer exactly once, the branches are not two or
            three different ones in ascending order, or the ids do not fit 64 bits.
    """

    num_layers: int
    branches: tuple[Branch, ...] = (Branch.SMALL, Branch.BIG)
    groups: int | Sequence[Sequence[int]] | None = None
    fixed: Mapping[int, Branch] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {self.num_layers}")
        branches = tuple(Branch(branch) for branch in self.branches)
        if len(branches) < 2 or list(branches) != sorted(set(branches)):
            raise ValueError(
                f"branches must be two or three different ones in ascending order, "
                f"got {[branch.name for branch in branches]}"
            )
        fixed = {layer: Branch(self.fixed[layer]) for layer in sorted(self.fixed)}
        groups = _grouped(self.groups, fixed, self.num_layers)
        if len(branches) ** len(groups) - 1 > _LARGEST_ID:
            raise ValueError(
                f"{len(branches)}^{len(groups)} routes do not fit 64-bit ids; use fewer layers, groups or branches"
            )
        for name, value in (("branches", branches), ("fixed", fixed), ("groups", groups)):
            object.__setattr__(self, name, value)

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> "RouteSpace":
        """Return the space that `facts` describes."""
        fixed = {int(layer): Branch[name.upper()] for layer, name in facts.get("fixed", {}).items()}
        return cls(facts["num_layers"], parse_branches(facts["branches"]), facts.get("groups"), fixed)

    @property
    def facts(self) -> dict[str, Any]:
        """What files say about the space of their route ids, for JSON."""
        return {
            "num_layers": self.num_layers,
            "branches": [branch.name.lower() for branch in self.branches],
            "groups": [list(layers) for layers in self.group_layers] if max(self.group_sizes) > 1 else None,
            "fixed": {str(layer): branch.name.lower() for layer, branch in self.fixed.items()},
        }

    @property
    def group_layers(self) -> tuple[tuple[int, ...], ...]:
        """The layers of each group, ascending; groups in the order of their first layers."""
        return self.groups  # type: ignore[return-value]  # normalised at construction

    @property
    def group_sizes(self) -> list[int]:
        """The number of layers in each group."""
        return [len(layers) for layers in self.group_layers]

    @property
    def leaders(self) -> list[int]:
        """The first layer of each group."""
        return [layers[0] for layers in self.group_layers]

    @property
    def by_layer(self) -> bool:
        """Whether every layer varies by itself."""
        return len(self.group_layers) == self.num_layers

    @property
    def lowest(self) -> Branch:
        """The branch of the cheapest uniform route that is compared: small, or skip where small is not allowed."""
        return Branch.SMALL if Branch.SMALL in self.branches else Branch.SKIP

    @property
    def base(self) -> int:
        """Number of branches, C."""
        return len(self.branches)

    @property
    def size(self) -> int:
        """Number of routes, R = C^J."""
        return int(self.base ** len(self.group_layers))

    @cached_property
    def place_values(self) -> NDArray[np.int64]:
        """What one step of each group's digit adds to an id, [J]."""
        return self.base ** np.arange(len(self.group_layers) - 1, -1, -1, dtype=np.int64)

    @cached_property
    def sums(self) -> list[dict[tuple[int, int], int]]:
        """What each group and its successors can spend together, and at the end nothing.

        Each entry counts, by numbers of small and of big layers, the ways to spend them.
        """
        sums: list[dict[tuple[int, int], int]] = [{(0, 0): 1}]
        for layers in reversed(self.group_sizes):
            counts: Counter[tuple[int, int]] = Counter()
            for (small, big), routes in sums[-1].items():
                for branch in self.branches:
                    counts[small + layers * (branch == Branch.SMALL), big + layers * (branch == Branch.BIG)] += routes
            sums.append(dict(counts))
        return sums[::-1]

    @property
    def spent_by_fixed(self) -> tuple[int, int]:
        """The numbers of small and of big layers among the fixed ones."""
        taken = list(self.fixed.values())
        return taken.count(Branch.SMALL), taken.count(Branch.BIG)

    @property
    def focus_budgets(self) -> tuple[int, int, int]:
        """The low, middle and high budget of this space."""
        return focus_budgets(self.num_layers, self.big_layers)

    @cached_property
    def routes_spending(self) -> dict[tuple[int, int], int]:
        """The number of routes with each pair of numbers (small layers, big layers), where there is one."""
        small, big = self.spent_by_fixed
        return {(small + more_small, big + more_big): n for (more_small, more_big), n in self.sums[0].items()}

    @cached_property
    def big_layers(self) -> list[int]:
        """The numbers of big layers that routes of this space have, ascending."""
        return sorted({big for _, big in self.routes_spending})

    @cached_property
    def _column_L(self) -> NDArray[np.int64]:
        """Where a layer's branch is found among those of the groups and then of the fixed layers."""
        column_L = np.empty(self.num_layers, dtype=np.int64)
        for column, layers in enumerate([*self.group_layers, *((layer,) for layer in self.fixed)]):
            column_L[list(layers)] = column
        return column_L

    def spread(self, choice: Integers) -> Integers:
        """Turn the branches of the groups, [..., J], into routes [..., L]."""
        varied: NDArray[np.int64] = _as_numpy(choice)
        fixed = np.array(list(self.fixed.values()), dtype=np.int64)
        both = np.concatenate([varied, np.broadcast_to(fixed, (*varied.shape[:-1], len(fixed)))], axis=-1)
        return _like(both.take(self._column_L, axis=-1), choice)

    def _choice(self, ids: Any) -> NDArray[np.int64]:
        """The branches of the groups, [..., J]."""
        array = _as_numpy(ids)
        if array.size and (array.min() < 0 or array.max() >= self.size):
            raise ValueError(f"route ids must be in 0 .. {self.size - 1}, got {array.min()} .. {array.max()}")
        digits = array[..., None] // self.place_values % self.base
        return np.asarray(self.branches, dtype=np.int64)[digits]

    def decode(self, ids: Integers) -> Integers:
        """Turn ids [...] into routes [..., L], values of `Branch`.

        Raises:
            ValueError: an id is outside 0 .. size - 1.
        """
        return _like(self.spread(self._choice(ids)), ids)

    def encode(self, routes: Integers) -> Integers:
        """Turn routes [..., L], values of `Branch`, into ids [...].

        Raises:
            ValueError: the number of layers is wrong, a branch is not in this space, or layers differ from their group
                or from what is fixed.
        """
        array = _as_numpy(routes)
        if array.ndim == 0 or array.shape[-1] != self.num_layers:
            raise ValueError(f"routes must end in a dimension of {self.num_layers} layers, got shape {array.shape}")
        choice = array[..., self.leaders]
        digit_of = np.full(len(Branch), -1, dtype=np.int64)
        digit_of[list(self.branches)] = np.arange(self.base)
        in_range = (choice >= 0) & (choice < len(Branch))
        digits = np.where(in_range, digit_of[np.where(in_range, choice, 0)], -1)
        if (digits < 0).any():
            allowed = ", ".join(f"{branch.name}={branch.value}" for branch in self.branches)
            raise ValueError(f"routes may hold only {allowed}; got {np.unique(choice[digits < 0]).tolist()}")
        other = np.argwhere(self.spread(choice) != array)
        if len(other):
            layer = int(other[0, -1])
            expected = f"is fixed to {self.fixed[layer].name}" if layer in self.fixed else "must be as its group"
            raise ValueError(f"layer {layer} {expected}, got {Branch(array[tuple(other[0])]).name}")
        return _like((digits * self.place_values).sum(-1), routes)

    def uniform(self, branch: Branch) -> int | None:
        """Return the id of the route that takes one branch at all layers, or None if it is not in this space."""
        if branch not in self.branches or any(fixed != branch for fixed in self.fixed.values()):
            return None
        return self.branches.index(branch) * int(self.place_values.sum())

    def ids_with(self, big: int) -> NDArray[np.int64]:
        """Return the ids, ascending, of all routes with exactly `big` big layers.

        Raises:
            ValueError: no route has that many big layers, or the space is too large to list.
        """
        check_big_layers(self, big)
        if self.size > LARGEST_LISTED:
            raise ValueError(
                f"{self.base}^{len(self.group_layers)} routes are too many to list; "
                "draw some with duollm.routes.sampling.draw_route_ids"
            )
        return np.flatnonzero(self.count_big(np.arange(self.size)) == big)

    def count_big(self, ids: Integers) -> Integers:
        """Return the number of big layers of routes [...], int64."""
        in_groups = (self._choice(ids) == Branch.BIG) @ np.array(self.group_sizes)
        return _like(in_groups + self.spent_by_fixed[1], ids)


def _grouped(
    given: int | Sequence[Sequence[int]] | None, fixed: Mapping[int, Branch], num_layers: int
) -> tuple[tuple[int, ...], ...]:
    """The groups, checked: each ascending, in the order of their first layers."""
    free = [layer for layer in range(num_layers) if layer not in fixed]
    groups: list[tuple[int, ...]]
    if given is None:
        groups = [(layer,) for layer in free]
    elif isinstance(given, int):
        if not 1 <= given <= len(free):
            raise ValueError(f"groups must be at most the {len(free)} layers that vary and at least 1, got {given}")
        groups = [tuple(part.tolist()) for part in np.array_split(free, given)]
    else:
        groups = sorted(tuple(sorted(layers)) for layers in given)
    if not groups or () in groups:
        raise ValueError("every group needs a layer, and some layer must vary; leave fixed layers out of groups")
    uses = Counter([*fixed, *(layer for layers in groups for layer in layers)])
    for layer in sorted({*uses, *range(num_layers)}):
        if not 0 <= layer < num_layers:
            raise ValueError(f"groups and fixed name layer {layer}; the layers are 0 .. {num_layers - 1}")
        if uses[layer] != 1:
            fault = "in no group and not fixed" if not uses[layer] else "named more than once"
            raise ValueError(f"layer {layer} is {fault}; groups and fixed must name every layer once")
    return tuple(groups)


def check_big_layers(space: RouteSpace, big: int) -> None:
    """Raise ValueError unless some route of `space` has exactly `big` big layers."""
    allowed = space.big_layers
    if big not in allowed:
        every = allowed == [*range(allowed[0], allowed[-1] + 1)]
        listed = f"{allowed[0]} .. {allowed[-1]}" if every else ", ".join(map(str, allowed))
        raise ValueError(f"a budget of {big} big layers is impossible here; allowed: {listed}")


def searchable_groups(layers: int, branches: int) -> int:
    """Return into how many groups to put layers so that there are at most 4,096 routes: of equal size if it can be."""
    most = min(layers, int(math.log(_EASILY_SEARCHED, branches) + 1e-9))
    return next((groups for groups in range(most, most * 2 // 3 - 1, -1) if layers % groups == 0), most)


def focus_budgets(num_layers: int, allowed: Sequence[int] = ()) -> tuple[int, int, int]:
    """Return the low, middle and high budget: the paper's 4, 6 and 8 of 12, scaled to the depth.

    If some budgets are `allowed`, return the nearest of them.
    """
    wanted = round(num_layers / 3), round(num_layers / 2), round(2 * num_layers / 3)
    low, middle, high = (min(allowed or [each], key=lambda big: (abs(big - each), big)) for each in wanted)
    return low, middle, high


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
