"""Budgets: what a route may spend.

The search keeps the best route per token and *cell*. A cell is the numbers of small and of big layers of a route. A
budget allows some cells, and its oracle is the best route over those. The *frontier* reads it from the best loss of
every cell.

Shape letters: Q cells, N tokens, K budgets, B sequences, T tokens.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Protocol, Self

import torch
from torch import Tensor

from duollm.config import ModelConfig
from duollm.errors import UserError
from duollm.flops import ffn_parameters
from duollm.models.branch import Branch
from duollm.models.configuration_duo import DuoConfig
from duollm.routes.space import RouteSpace, check_big_layers


@dataclass(frozen=True)
class Cells:
    """All cells of a route space, cheapest first (at equal costs, fewer big layers first).

    Args:
        space: the routes.
        small_cost, big_cost: cost of one layer, in any unit, such as the FFNs' inner widths (FLOPs are proportional).
    """

    space: RouteSpace
    small_cost: int
    big_cost: int

    @classmethod
    def of_model(cls, space: RouteSpace, sizes: DuoConfig | ModelConfig) -> Self:
        """Return the cells with the costs of a model's FFNs. In a recipe these cost what they are wide."""
        if isinstance(sizes, ModelConfig):
            return cls(space, sizes.small_intermediate_size, sizes.intermediate_size)
        return cls(space, *ffn_parameters(sizes)[1:])

    @cached_property
    def spent(self) -> list[tuple[int, int]]:
        """The pair (small layers, big layers) of every cell."""
        return sorted(self.space.routes_spending, key=lambda pair: (self.cost(*pair), pair[1]))

    @cached_property
    def routes(self) -> list[int]:
        """The number of routes in every cell."""
        return [self.space.routes_spending[spent] for spent in self.spent]

    @cached_property
    def _index(self) -> Tensor:
        """Cells by (small layers, big layers)."""
        index = torch.zeros(self.space.num_layers + 1, self.space.num_layers + 1, dtype=torch.long)
        for cell, spent in enumerate(self.spent):
            index[spent] = cell
        return index

    def index(self, small: Tensor, big: Tensor) -> Tensor:
        """Return the cells of routes with these numbers of small and big layers, as indices into `spent`."""
        return self._index.to(big.device, non_blocking=True)[small, big]

    def of_routes(self, ids: Tensor) -> Tensor:
        """Return the cells of routes, as indices into `spent`."""
        routes = self.space.decode(ids)
        return self.index(*((routes == branch).sum(-1) for branch in (Branch.SMALL, Branch.BIG)))

    def allowed(self, budget: "Budget", positions: range) -> Tensor:
        """Return which cells a budget allows at each position, bool [Q, positions]; not to be written to."""
        return _allowed(self, budget, positions)

    def bigs(self, budget: "Budget") -> list[int]:
        """Return the numbers of big layers that a budget allows at every position, ascending."""
        return sorted({big for (_, big), allowed in zip(self.spent, budget.allows(self, 0), strict=True) if allowed})

    def wanted(self, budgets: "Sequence[Budget]", positions: range) -> Tensor:
        """Return the cells that some budget allows at some position, bool [Q]."""
        return torch.stack([self.allowed(budget, positions).any(-1) for budget in budgets]).any(0)

    def cost(self, small: int, big: int) -> int:
        """Return the cost of this many small and big layers."""
        return small * self.small_cost + big * self.big_cost

    def share(self, small: int, big: int) -> float:
        """Return the cost as a share of all big."""
        return self.cost(small, big) / (self.space.num_layers * self.big_cost)


class Budget(Hashable, Protocol):
    """What a token may spend."""

    @property
    def name(self) -> str:
        """Short, for column names."""
        ...

    def allows(self, cells: Cells, position: int) -> list[bool]:
        """Return which cells a token at `position` (0 first) may take."""
        ...


@lru_cache(maxsize=1024)  # every reduction reads every budget, in every window
def _allowed(cells: Cells, budget: Budget, positions: range) -> Tensor:
    return torch.tensor([budget.allows(cells, position) for position in positions]).T


@dataclass(frozen=True)
class Exactly:
    """Exactly `big` big layers."""

    big: int

    @property
    def name(self) -> str:
        """Short, for column names."""
        return f"k{self.big}"

    def allows(self, cells: Cells, position: int) -> list[bool]:
        """Cells with that many big layers."""
        check_big_layers(cells.space, self.big)
        return [big == self.big for _, big in cells.spent]


@dataclass(frozen=True)
class AtMost:
    """At most `big` big layers."""

    big: int

    @property
    def name(self) -> str:
        """Short, for column names."""
        return f"atmost{self.big}"

    def allows(self, cells: Cells, position: int) -> list[bool]:
        """Cells with up to that many big layers."""
        check_big_layers(cells.space, self.big)
        return [big <= self.big for _, big in cells.spent]


@dataclass(frozen=True)
class FlopsShare:
    """At most `share` of the FFN FLOPs of all big."""

    share: float

    @property
    def name(self) -> str:
        """Short, for column names."""
        return f"flops{self.share:g}"

    def allows(self, cells: Cells, position: int) -> list[bool]:
        """Cells that cost no more."""
        allowed = [cells.share(*pair) <= self.share + 1e-9 for pair in cells.spent]
        if not any(allowed):
            cheapest = cells.share(*cells.spent[0])
            raise ValueError(f"no route costs at most {self.share} of all big; the cheapest costs {cheapest:.4f}")
        return allowed


@dataclass(frozen=True)
class Schedule:
    """A number of big layers for each position of the sequence. The last number holds for all later positions."""

    big_by_position: tuple[int, ...]

    @classmethod
    def ramp(cls, first: int, last: int, tokens: int) -> "Schedule":
        """Return a schedule from `first` to `last` in equal steps over `tokens` positions (paper, Fig. 4c)."""
        slope = (last - first) / max(1, tokens - 1)
        return cls(tuple(round(first + slope * position) for position in range(tokens)))

    @property
    def name(self) -> str:
        """Short, for column names."""
        return f"ramp{self.big_by_position[0]}to{self.big_by_position[-1]}"

    def allows(self, cells: Cells, position: int) -> list[bool]:
        """Cells with the position's number of big layers."""
        return Exactly(self.big_by_position[min(position, len(self.big_by_position) - 1)]).allows(cells, position)


@dataclass(frozen=True)
class OnAverage:
    """`big` big layers on average over all tokens given, split between the tokens so that it helps most."""

    big: float

    @property
    def name(self) -> str:
        """Short, for column names."""
        return f"average{self.big:g}"

    def allows(self, cells: Cells, position: int) -> list[bool]:
        """Any cell: the limit is on the sum."""
        least, most = cells.space.big_layers[0], cells.space.big_layers[-1]
        if not least <= self.big <= most:
            raise ValueError(f"an average of {self.big} big layers is impossible here; allowed: {least} .. {most}")
        return [True] * len(cells.spent)


def parse_budgets(
    big_layers: Sequence[int] | None, budgets: Sequence[Budget] | None, space: RouteSpace
) -> list[Budget]:
    """Return the budgets, given in one of two ways, as one list. Default: exactly k for every possible k.

    Raises:
        ValueError: both are given, the list is empty, or a number of big layers is impossible.
    """
    if big_layers is not None and budgets is not None:
        raise ValueError("give big_layers or budgets, not both")
    if budgets is None:
        budgets = [Exactly(int(big)) for big in (space.big_layers if big_layers is None else big_layers)]
    if not budgets or len(set(budgets)) != len(budgets):
        raise ValueError(f"budgets must be one or more different ones, got {list(budgets)}")
    return list(budgets)


def parse_budget(text: str, positions: int) -> Budget:
    """Read `at-most 4`, `flops 0.5`, `average 4` or `ramp 6 2` as a budget for this number of positions.

    Raises:
        UserError: `text` is something else.
    """
    makers: dict[str, Callable[..., Budget]] = {
        "at-most": lambda big: AtMost(int(big)),
        "flops": lambda share: FlopsShare(float(share)),
        "average": lambda big: OnAverage(float(big)),
        "ramp": lambda first, last: Schedule.ramp(int(first), int(last), positions),
    }
    try:
        kind, *numbers = text.split()
        return makers[kind](*numbers)
    except (KeyError, TypeError, ValueError):
        allowed = "`at-most 4`, `flops 0.5`, `average 4`, `ramp 6 2`"
        raise UserError(f"cannot read budget {text!r}; budgets look like {allowed}") from None


@dataclass(frozen=True)
class Frontier:
    """Finds the best cell of every budget in what was kept per cell and token; N = B * T.

    Attributes:
        padding_BT: padding, which neither spends nor counts.
        first_position: position of the first of the T tokens in the sequence.
    """

    budgets: Sequence[Budget]
    cells: Cells
    padding_BT: Tensor
    first_position: int = 0

    def read(self, nll_QN: Tensor, wanted_QN: Tensor) -> Tensor:
        """Read values of the best cell of every budget, [K, B, T]; nan (or -1) at padding. Ties go to the cheaper cell.

        Args:
            nll_QN: best nll (nats) of each cell, +inf where a cell was not searched.
            wanted_QN: the values to read in the best cell, such as its nll or its route ids.
        """
        nll_QBT, wanted_QBT = (each.view(-1, *self.padding_BT.shape) for each in (nll_QN, wanted_QN))
        chosen_KBT = torch.stack([self._choose(budget, nll_QBT) for budget in self.budgets])
        nothing = torch.nan if wanted_QN.is_floating_point() else -1
        return wanted_QBT.gather(0, chosen_KBT).masked_fill(self.padding_BT, nothing)

    def _choose(self, budget: Budget, nll_QBT: Tensor) -> Tensor:
        """The best cell within a budget, [B, T]."""
        if isinstance(budget, OnAverage):
            chosen_BT = torch.zeros_like(nll_QBT[0], dtype=torch.long)
            counted_BT = ~self.padding_BT
            chosen_BT[counted_BT] = _split_between_tokens(budget.big, self.cells, nll_QBT[:, counted_BT])
            return chosen_BT
        positions = range(self.first_position, self.first_position + nll_QBT.shape[-1])
        allowed_QT = self.cells.allowed(budget, positions).to(nll_QBT.device, non_blocking=True)
        return _first_lowest(nll_QBT.masked_fill(~allowed_QT[:, None], torch.inf))


def _first_lowest(values: Tensor) -> Tensor:
    """Index of the lowest value along the first axis, the first of equals (argmin promises no order)."""
    lowest = values.amin(0, keepdim=True)
    positions = torch.arange(len(values), device=values.device).view(-1, *[1] * (values.ndim - 1))
    return positions.where(values == lowest, len(values)).amin(0)


def _split_between_tokens(mean_big: float, cells: Cells, nll_QN: Tensor) -> Tensor:
    """Cells per token that minimise the total nll with `mean_big` big layers on average, [N].

    A price per big layer makes every token choose for itself (the Lagrangian); the total spent falls
    as the price rises. Bisection finds the price at which the tokens spend just what is allowed; what
    a step of the price leaves unspent goes, one token at a time, to those that gain most per layer.
    """
    big_Q = torch.tensor([float(big) for _, big in cells.spent], device=nll_QN.device)
    limit = mean_big * nll_QN.shape[1]

    def choose(price: float) -> Tensor:
        return _first_lowest(nll_QN.double() + price * big_Q[:, None])

    low, high = 0.0, 1.0
    if big_Q[choose(0.0)].sum() <= limit:
        return choose(0.0)
    while big_Q[choose(high)].sum() > limit:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if big_Q[choose(middle)].sum() > limit else (low, middle)
    split_N = _spend_rest(choose(high), choose(low), nll_QN, big_Q, limit)
    alike_N = _first_lowest(nll_QN.masked_fill(big_Q[:, None] > mean_big, torch.inf))
    # The price can miss by a token's step; with few tokens, the same limit for all may then be better.
    return min((split_N, alike_N), key=lambda cell_N: nll_QN.gather(0, cell_N[None]).sum().item())


def _spend_rest(frugal_N: Tensor, lavish_N: Tensor, nll_QN: Tensor, big_Q: Tensor, limit: float) -> Tensor:
    """Move tokens from their frugal to their lavish cell while it fits, then wherever the rest still helps."""
    extra_N = big_Q[lavish_N] - big_Q[frugal_N]
    gain_N = (nll_QN.gather(0, frugal_N[None]) - nll_QN.gather(0, lavish_N[None]))[0]
    order = (gain_N / extra_N.clamp(min=1)).argsort(descending=True)
    order = order[extra_N[order] > 0]
    fits = big_Q[frugal_N].sum() + extra_N[order].cumsum(0) <= limit
    chosen_N = frugal_N.clone()
    chosen_N[order[fits]] = lavish_N[order[fits]]
    while True:
        left = limit - big_Q[chosen_N].sum()
        gain_QN = nll_QN.gather(0, chosen_N[None]) - nll_QN
        gain_QN[big_Q[:, None] - big_Q[chosen_N] > left] = 0
        best = int(gain_QN.argmax())
        if gain_QN.flatten()[best] <= 0:
            return chosen_N
        chosen_N[best % nll_QN.shape[1]] = best // nll_QN.shape[1]
