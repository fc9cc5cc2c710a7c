"""Methods that do not try every route: random routes, neighbours of the best so far (local search), a beam over layers.

Shape letters: N tokens, A moves, G groups of tokens that try the same routes, U tokens in a group, P routes or prefixes
side by side, M candidates, W chosen candidates, J groups of layers, C branches, K budgets, B sequences, T tokens given,
D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from duollm.models.branch import Branch
from duollm.oracle.budgets import Budget, Cells
from duollm.oracle.tree import Prefixes, Tree, join
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


@dataclass(frozen=True)
class Beam(Method):
    """A beam over the layers: one per token in contexts "reference" and "committed", one per sequence in "shared".

    It keeps the prefixes that promise most. The promise of a prefix is an estimate of the loss to which it leads. The
    remaining layers are assumed to add to its hidden state what they add on the reference route, all layers big, and
    the loss is estimated by the head's lower bound, so no prefix runs the full head. Prefixes compete only with those
    that have the same number of big layers; otherwise all would spend their budget in the first layers. Tokens that
    must share prefixes keep those that together serve them best.

    One beam serves all budgets. It holds `width` prefixes, divided between the numbers of big layers from which a
    budget can still be met (at least one prefix each). So time grows with width * L. Hidden states take width * (C + 1)
    * N * D * 4 bytes, whatever `memory_bytes` says.

    Attributes:
        width: number of prefixes to keep after each layer, over all budgets.
    """

    least = (("width", 1),)
    width: int = 64

    def __call__(self, trial: Trial, budgets: Sequence[Budget], generator: torch.Generator) -> None:
        """Walk from the first choice to the last, and enter the routes that reach the end."""
        cells, space = trial.cells, trial.cells.space
        all_big_1G = torch.full((1, trial.groups), space.size - 1)
        completed_1ND = [*trial.follow(all_big_1G)]
        tree = Tree(trial.model.model, cells, cells.wanted(budgets, trial.positions), trial.rows)
        block = tree.root(trial.hidden_ND, trial.attend, trial.groups)
        for depth, walked in enumerate([*space.leaders[1:], None]):
            parts = block.parts(trial.rows.walked)
            block = join([child for part in parts for child in tree.step(part, depth, trial.attend)])
            if walked is not None:
                rest_1ND = completed_1ND[-1] - completed_1ND[walked]
                parts = block.parts(trial.rows.walked)
                promise_PN = torch.cat([trial.estimate(part.hidden_PND + rest_1ND) for part in parts])
                promise_PGU = promise_PN.where(trial.counted_N, 0).unflatten(1, (trial.groups, -1))
                big_P = block.spent_PG2[:, 0, 1]  # as many for every group
                block = _choose(block, _best(big_P, promise_PGU, self.width))
        for part in block.parts(trial.rows.walked):
            trial.enter(part.ids_PG, part.spent_PG2, part.hidden_PND)


def _choose(block: Prefixes, rows_WG: Tensor) -> Prefixes:
    """Let every group choose rows of its own; those beside each other have as many big layers."""
    groups_G = torch.arange(rows_WG.shape[1], device=rows_WG.device)
    hidden_WGUD = block.hidden_PND.unflatten(1, (len(groups_G), -1))[rows_WG, groups_G]
    here = rows_WG.cpu(), torch.arange(rows_WG.shape[1])
    return Prefixes(block.ids_PG[here], block.spent_PG2[here], hidden_WGUD.flatten(1, 2))


def _best(big_P: Tensor, promise_PGU: Tensor, width: int) -> Tensor:
    """The rows that each group keeps, [W, G]: a quota of every number of big layers."""
    strata = [(big_P == big).nonzero()[:, 0].to(promise_PGU.device, non_blocking=True) for big in big_P.unique()]
    quotas = _divide(width, [len(rows) for rows in strata])
    return torch.cat([rows[_keep(promise_PGU[rows], quota)] for rows, quota in zip(strata, quotas, strict=True)])


def _divide(width: int, candidates: list[int]) -> list[int]:
    """Divide the width between strata: at least one each, no more than it has, else as equally as can be."""
    quotas = [0] * len(candidates)
    for served, stratum in enumerate(sorted(range(len(candidates)), key=lambda each: candidates[each])):
        fair = (width - sum(quotas)) // (len(candidates) - served)
        quotas[stratum] = min(candidates[stratum], max(1, fair))
    return quotas


def _keep(promise_MGU: Tensor, quota: int) -> Tensor:
    """The candidates that each group keeps, [quota, G].

    A token alone keeps the best. A group keeps those that serve it best together: each in turn is the one by which the
    sum over the tokens of the lowest promise falls most.
    """
    if promise_MGU.shape[-1] == 1:
        return promise_MGU[..., 0].sort(dim=0, stable=True).indices[:quota]
    groups = torch.arange(promise_MGU.shape[1], device=promise_MGU.device)
    lowest_GU = promise_MGU.new_full(promise_MGU.shape[1:], torch.finfo(promise_MGU.dtype).max / promise_MGU.shape[2])
    left_MG = torch.zeros(promise_MGU.shape[:2], device=promise_MGU.device)
    chosen = []
    for _ in range(quota):
        chosen_G = (torch.minimum(promise_MGU, lowest_GU).sum(-1) + left_MG).argmin(0)
        lowest_GU = torch.minimum(lowest_GU, promise_MGU[chosen_G, groups])
        left_MG[chosen_G, groups] = torch.inf
        chosen.append(chosen_G)
    return torch.stack(chosen)
