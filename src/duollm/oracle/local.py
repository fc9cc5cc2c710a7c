"""Local search: from a start route, change one or two layers at a time while it helps.

Shape letters: N tokens, A moves, G groups of tokens that try the same routes, P routes tried side by
side, L layers, C branches, K budgets, B sequences, T tokens given.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Unpack

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from duollm.models.branch import Branch
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.oracle.approximate import Limit, Options, allowed_bigs, draw_within, search_with
from duollm.oracle.budgets import Budget, parse_budgets
from duollm.oracle.result import OracleResult
from duollm.oracle.trial import Trial
from duollm.routes.space import RouteSpace

_DRAWS = 32


def local_search(
    model: DuoForCausalLM,
    input_ids: Tensor,
    space: RouteSpace,
    context: str = "shared",
    big_layers: Sequence[int] | None = None,
    *,
    start: Tensor | None = None,
    steps: int = 16,
    width: int = 16,
    **options: Unpack[Options],
) -> OracleResult:
    """Better a route of every predicted token within each budget, move by move.

    A move changes one layer's branch, or exchanges the branches of two layers. Each step tries all
    moves of a token that keep its budget and takes the best, until none helps. In context "shared"
    the tokens of a sequence try routes together, so a step tries those that most of its tokens want,
    and a token may be left with a move untried.

    Args:
        start: route ids to start from, of a shape that broadcasts to [K, B, T - 1], for instance
            another search's `route_ids`; default: the best of 32 random routes per budget.
        steps: how many steps at most.
        width: context "shared": how many routes a step tries at most.

    The other arguments are those of `search_oracle` and `Options`.

    Raises:
        ValueError: as `search_oracle`; a budget that is neither `Exactly` nor `AtMost`; a start
            outside its budget.
    """
    if width < 1 or steps < 0:
        given = f"width must be at least 1, got {width}" if width < 1 else f"steps must be at least 0, got {steps}"
        raise ValueError(given)
    wanted = parse_budgets(big_layers, options.get("budgets"), space)
    starts = None if start is None else dict(zip(wanted, _starts(start, wanted, input_ids, space), strict=True))

    def method(trial: Trial, limits: list[Limit], generator: torch.Generator) -> None:
        for limit in limits:
            climb = _Climb(trial, limit, width)
            # One drawn route even beside a given start: padding has no route to start from.
            draws = _DRAWS if starts is None else 1
            trial.try_routes(draw_within(limit, space, (draws, trial.groups), generator))
            if starts is not None:
                climb.start(starts[limit].flatten()[trial.rows_N])
            climb.search(steps)

    return search_with(method, model, input_ids, space, context, big_layers, **options)


@dataclass
class _Climb:
    """The search for one budget.

    Attributes:
        width: how many routes a sequence tries in a step, in context "shared".
        seen: the routes that each sequence has tried, in context "shared".
    """

    trial: Trial
    limit: Limit
    width: int
    seen: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.seen = [self.trial.rows_N.new_empty(0)] * self.trial.groups

    def start(self, ids_N: Tensor) -> None:
        """Try the routes to start from."""
        ids_1N = ids_N.clamp(min=0)[None]
        self.trial.try_routes(ids_1N if self.trial.together == 1 else self._most_wanted(ids_1N, len(ids_N)))

    def search(self, steps: int) -> None:
        """Step until nothing is left to try, or nothing helped."""
        trial = self.trial
        nll_N, ids_N = trial.best(self.limit)
        for _ in range(steps):
            wanted_AN = ids_N + moves(ids_N, self.limit, trial.cells.space)
            ids_PG = wanted_AN if trial.together == 1 else self._most_wanted(wanted_AN, self.width)
            if not len(ids_PG):
                return
            trial.try_routes(ids_PG)
            before_N = nll_N
            nll_N, ids_N = trial.best(self.limit)
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


def moves(ids_N: Tensor, limit: Limit, space: RouteSpace) -> Tensor:
    """What to add to route ids for every move that keeps the budget, [A, N]; 0 fills up.

    A move gives one layer another branch, or exchanges the branches of two layers.
    """
    place_L = space.base ** torch.arange(space.num_layers - 1, -1, -1, device=ids_N.device)
    digit_NL = ids_N[:, None] // place_L % space.base
    exchange_NLL = (digit_NL[:, None, :] - digit_NL[:, :, None]) * (place_L[:, None] - place_L)
    digits_C = torch.arange(space.base, device=ids_N.device)
    change_NLC = (digits_C - digit_NL[..., None]) * place_L[:, None]
    big_C = torch.tensor([branch == Branch.BIG for branch in space.branches], device=ids_N.device).long()
    total_NLC = big_C[digit_NL].sum(-1)[:, None, None] - big_C[digit_NL][..., None] + big_C
    within_NLC = torch.isin(total_NLC, torch.tensor(allowed_bigs(limit), device=ids_N.device))
    moves_NA = torch.cat([exchange_NLL.triu().flatten(1), change_NLC.where(within_NLC, 0).flatten(1)], dim=1)
    useful_NA = moves_NA != 0
    order_NA = useful_NA.int().argsort(dim=1, descending=True, stable=True)
    return moves_NA.gather(1, order_NA[:, : int(useful_NA.sum(1).max())]).T


def _starts(start: Tensor, budgets: list[Budget], input_ids: Tensor, space: RouteSpace) -> Tensor:
    """The start routes of every budget and token, [K, B, T - 1]."""
    shape = (len(budgets), len(input_ids), input_ids.shape[-1] - 1)
    try:
        start_KBT = start.expand(shape)
    except RuntimeError:
        raise ValueError(f"start must broadcast to shape {list(shape)}, got {list(start.shape)}") from None
    for budget, ids_BT in zip(budgets, start_KBT, strict=True):
        bigs = space.count_big(ids_BT[ids_BT >= 0])
        if (
            isinstance(budget, Limit)
            and not torch.isin(bigs, torch.tensor(allowed_bigs(budget), device=bigs.device)).all()
        ):
            raise ValueError(f"start has routes with {bigs.min()} .. {bigs.max()} big layers, the budget is {budget}")
    return start_KBT
