"""Methods that try whole routes: random routes, or neighbours of the best so far (local search).

Shape letters: N tokens, A moves, G groups of tokens that try the same routes, P routes tried side by
side, J groups of layers, C branches, K budgets, B sequences, T tokens given.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from duollm.models.branch import Branch
from duollm.oracle.budgets import Budget, Cells
from duollm.oracle.trial import Method, Trial
from duollm.routes.sampling import draw_route_ids

_DRAWS = 32


@dataclass(frozen=True)
class Sampled(Method):
    """Tries random routes within each budget: the baseline of the other methods.

    Every token has its own draws. In context "shared" every sequence has; in "committed" every position has new ones.
    A route within several budgets counts for all of them.

    Attributes:
        routes: number of routes to draw per budget, uniformly and with replacement.
    """

    least = (("routes", 1),)
    routes: int = 100

    def __call__(self, trial: Trial, budgets: Sequence[Budget], generator: torch.Generator) -> None:
        """Draw and try."""
        for budget in budgets:
            trial.try_routes(draw_within(budget, trial.cells, (self.routes, trial.groups), generator))


@dataclass
class Local(Method):
    """Improves a route of every token within each budget, move by move.

    A move changes the branch of one group of layers, or exchanges the branches of two groups. Each step tries all moves
    of a token that keep its budget and takes the best, until none helps. In context "shared" the tokens of a sequence
    try routes together. A step then tries the routes that most of the tokens want, so some moves of a token may stay
    untried.

    Attributes:
        start: route ids to start from, of a shape that broadcasts to [K, B, T - 1], for instance
            another search's `route_ids`; default: the best of 32 random routes per budget.
        steps: largest number of steps.
        width: largest number of routes that a step tries in context "shared".
    """

    least = (("width", 1), ("steps", 0))
    start: Tensor | None = None
    steps: int = 16
    width: int = 16
    _start_of: dict[Budget, Tensor] = field(default_factory=dict, init=False)

    def begin(self, budgets: Sequence[Budget], cells: Cells, shape_BT: torch.Size) -> None:
        """Check the budgets and the settings; find the start of every budget."""
        super().begin(budgets, cells, shape_BT)
        if self.start is None:
            return
        shape = (len(budgets), *shape_BT)
        try:
            start_KBT = self.start.expand(shape)
        except RuntimeError:
            raise ValueError(f"start must broadcast to shape {list(shape)}, got {list(self.start.shape)}") from None
        for budget, ids_BT in zip(budgets, start_KBT, strict=True):
            bigs = cells.space.count_big(ids_BT[ids_BT >= 0])
            if not torch.isin(bigs, torch.tensor(cells.bigs(budget), device=bigs.device)).all():
                raise ValueError(
                    f"start has routes with {bigs.min()} .. {bigs.max()} big layers, the budget is {budget}"
                )
            self._start_of[budget] = ids_BT.flatten()

    def __call__(self, trial: Trial, budgets: Sequence[Budget], generator: torch.Generator) -> None:
        """Climb, budget by budget."""
        for budget in budgets:
            climb = _Climb(trial, budget, self.width)
            # One drawn route even beside a given start: padding has no route to start from.
            draws = _DRAWS if self.start is None else 1
            trial.try_routes(draw_within(budget, trial.cells, (draws, trial.groups), generator))
            if self.start is not None:
                start_N = self._start_of[budget].to(trial.rows_N.device)[trial.rows_N]
                climb.try_wanted(start_N.clamp(min=0)[None], most=len(trial.rows_N))
            climb.search(self.steps)


@dataclass
class _Climb:
    """The search for one budget.

    Attributes:
        width: how many routes a sequence tries in a step, in context "shared".
        seen: the routes that each sequence has tried, in context "shared".
    """

    trial: Trial
    budget: Budget
    width: int
    seen: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.seen = [self.trial.rows_N.new_empty(0)] * self.trial.groups

    def try_wanted(self, wanted_AN: Tensor, most: int) -> bool:
        """Try what the tokens want, or together the `most` wanted routes; return whether there was any."""
        ids_PG = wanted_AN if self.trial.together == 1 else self._most_wanted(wanted_AN, most)
        if len(ids_PG):
            self.trial.try_routes(ids_PG)
        return bool(len(ids_PG))

    def search(self, steps: int) -> None:
        """Step until nothing is left to try, or nothing helped."""
        trial = self.trial
        nll_N, ids_N = trial.found(self.budget)
        for _ in range(steps):
            if not self.try_wanted(ids_N + moves(ids_N, self.budget, trial.cells), self.width):
                return
            before_N = nll_N
            nll_N, ids_N = trial.found(self.budget)
            if trial.together == 1 and not (nll_N < before_N)[trial.counted_N].any():
                return

    def _most_wanted(self, wanted_AN: Tensor, most: int) -> Tensor:
        """For each sequence the new routes that most of its tokens want, [P, G]; filled up with route 0."""
        chosen = []
        counted_GT = self.trial.counted_N.unflatten(0, (self.trial.groups, -1))
        for group, wanted_AT in enumerate(wanted_AN.split(self.trial.together, dim=1)):
            ids_M, votes_M = wanted_AT[:, counted_GT[group]].unique(return_counts=True)
            new_M = ~torch.isin(ids_M, self.seen[group])
            ids_M = ids_M[new_M][votes_M[new_M].argsort(descending=True, stable=True)][:most]
            self.seen[group] = torch.cat([self.seen[group], ids_M])
            chosen.append(ids_M)
        return pad_sequence(chosen)


def moves(ids_N: Tensor, budget: Budget, cells: Cells) -> Tensor:
    """Return what to add to route ids for every move that keeps the budget, [A, N], padded with 0.

    A move gives one group of layers another branch, or exchanges the branches of two groups.
    """
    space, device = cells.space, ids_N.device
    place_J, size_J = torch.from_numpy(space.place_values).to(device), torch.tensor(space.group_sizes, device=device)
    digit_NJ = ids_N[:, None] // place_J % space.base
    digits_C = torch.arange(space.base, device=device)
    big_C = torch.tensor([branch == Branch.BIG for branch in space.branches], device=device).long()
    big_NJ, total_N, allowed = big_C[digit_NJ], space.count_big(ids_N), torch.tensor(cells.bigs(budget), device=device)
    exchange_NJJ = (digit_NJ[:, None, :] - digit_NJ[:, :, None]) * (place_J[:, None] - place_J)
    bigger_NJJ = (big_NJ[:, None, :] - big_NJ[:, :, None]) * (size_J[:, None] - size_J)
    change_NJC = (digits_C - digit_NJ[..., None]) * place_J[:, None]
    bigger_NJC = (big_C - big_NJ[..., None]) * size_J[:, None]
    exchange_NJJ = exchange_NJJ.where(torch.isin(total_N[:, None, None] + bigger_NJJ, allowed), 0)
    change_NJC = change_NJC.where(torch.isin(total_N[:, None, None] + bigger_NJC, allowed), 0)
    moves_NA = torch.cat([exchange_NJJ.triu().flatten(1), change_NJC.flatten(1)], dim=1)
    useful_NA = moves_NA != 0
    order_NA = useful_NA.int().argsort(dim=1, descending=True, stable=True)
    return moves_NA.gather(1, order_NA[:, : int(useful_NA.sum(1).max())]).T


def draw_within(budget: Budget, cells: Cells, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw ids [*shape] uniformly, with replacement, among the routes that a budget allows."""
    bigs = cells.bigs(budget)
    routes_with = {k: sum(n for (_, big), n in zip(cells.spent, cells.routes, strict=True) if big == k) for k in bigs}
    weights = torch.tensor([float(count) for count in routes_with.values()], device=generator.device)
    chosen = torch.multinomial(weights, torch.Size(shape).numel(), replacement=True, generator=generator)
    drawn = torch.stack([draw_route_ids(cells.space, big, shape, generator) for big in bigs])
    return drawn.gather(0, chosen.view(1, *shape))[0]
