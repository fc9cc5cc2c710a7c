"""What the approximate searches share: their budgets, and how they go through a context.

An approximate search is a `Method`: it decides which routes the tokens of a `Trial` try. The losses
it reports are exact; that no other route is better is not promised.

Shape letters: B sequences, T tokens given, N = B * (T - 1) predicted tokens.
"""

from collections.abc import Callable, Sequence
from math import comb
from typing import TypedDict, Unpack

import torch
from torch import Tensor

from duollm.models.branch import Branch
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.oracle.batch import Batch
from duollm.oracle.budgets import AtMost, Budget, Cells, Exactly, parse_budgets
from duollm.oracle.frontier import read_frontier
from duollm.oracle.head import HeadBound
from duollm.oracle.result import OracleResult, stack_budgets
from duollm.oracle.search import check_search, left_to_right, max_rows_for
from duollm.oracle.tree import Attend
from duollm.oracle.trial import Trial
from duollm.routes.sampling import draw_route_ids
from duollm.routes.space import RouteSpace

Limit = Exactly | AtMost
Method = Callable[[Trial, list[Limit], torch.Generator], None]
"""Lets the tokens of a trial try routes, at least one within each budget."""


class Options(TypedDict, total=False):
    """Options that the approximate searches share with `search_oracle`, and their meaning there.

    Attributes:
        budgets: instead of big_layers; `Exactly` and `AtMost` only.
        attention_mask: 1 for tokens, 0 for padding, [B, T].
        reference: routes [L] or [B, T, L] of the earlier tokens in context "reference"; default all big.
        generator: source of the random draws, on the model's device; default: seeded with 0.
        memory_bytes: budget for the search's tensors, the model not counted; default 1 GiB.
    """

    budgets: Sequence[Budget] | None
    attention_mask: Tensor | None
    reference: Tensor | None
    generator: torch.Generator | None
    memory_bytes: int


@torch.inference_mode()
def search_with(
    method: Method,
    model: DuoForCausalLM,
    input_ids: Tensor,
    space: RouteSpace,
    context: str,
    big_layers: Sequence[int] | None,
    **options: Unpack[Options],
) -> OracleResult:
    """Let every predicted token try the routes that `method` proposes; return the best per budget.

    Raises:
        ValueError: illegal ids, context, space or budget; the message says what is allowed.
    """
    check_search(model, input_ids, space, context)
    reference = options.get("reference")
    if context != "reference" and reference is not None:
        raise ValueError(f"reference goes with context 'reference', got context {context!r}")
    limits = [_limit(budget) for budget in parse_budgets(big_layers, options.get("budgets"), space)]
    generator = options.get("generator") or torch.Generator(model.device).manual_seed(0)
    batch = Batch(model, input_ids, options.get("attention_mask"))
    cells = Cells(space, model.config.small_intermediate_size, model.config.intermediate_size)
    bound = HeadBound.around(model, batch.states())
    max_rows = max_rows_for(model.config, space, options.get("memory_bytes", 2**30))
    rows_BT = torch.arange(batch.padding_BT.numel(), device=input_ids.device).view_as(batch.padding_BT)

    def search(attend: Attend, limits: list[Limit], positions: slice, together: int = 1) -> OracleResult:
        trial = Trial(batch, cells, rows_BT[:, positions].flatten(), attend, together, max_rows, bound)
        method(trial, limits, generator)
        return _read(trial, limits, batch.padding_BT[:, positions])

    def committed(limit: Limit) -> OracleResult:
        return left_to_right(batch, space, lambda t, attend: search(attend, [limit], slice(t, t + 1)))

    if context == "committed":
        return stack_budgets([committed(limit) for limit in limits])
    if context == "reference":
        return search(batch.reference_context(reference), limits, slice(None))
    return search(batch.shared_context(), limits, slice(None), together=rows_BT.shape[1])


def allowed_bigs(limit: Limit) -> list[int]:
    """The numbers of big layers that a budget allows."""
    return [limit.big] if isinstance(limit, Exactly) else list(range(limit.big + 1))


def draw_within(limit: Limit, space: RouteSpace, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw ids [*shape] uniformly, with replacement, among the routes that a budget allows."""
    bigs = allowed_bigs(limit)
    weights = torch.tensor([float(_routes_with(big, space)) for big in bigs], device=generator.device)
    chosen = torch.multinomial(weights, torch.Size(shape).numel(), replacement=True, generator=generator)
    drawn = torch.stack([draw_route_ids(space, big, shape, generator) for big in bigs])
    return drawn.gather(0, chosen.view(1, *shape))[0]


def _limit(budget: Budget) -> Limit:
    if not isinstance(budget, Limit):
        raise ValueError(f"approximate searches take budgets Exactly and AtMost, got {budget}; use search_oracle")
    return budget


def _routes_with(big: int, space: RouteSpace) -> int:
    """How many routes have exactly `big` big layers."""
    others = sum(branch != Branch.BIG for branch in space.branches)
    return comb(space.num_layers, big) * others ** (space.num_layers - big)


def _read(trial: Trial, limits: list[Limit], padding_BT: Tensor) -> OracleResult:
    """Read the budgets off what was tried."""
    contest = trial.contest
    nll, route_ids = (
        read_frontier(limits, trial.cells, contest.nll_QN, each, padding_BT)
        for each in (contest.nll_QN, contest.ids_QN)
    )
    bigs = {big for limit in limits for big in allowed_bigs(limit)}
    routes = sum(_routes_with(big, trial.cells.space) for big in bigs)
    share = min(1.0, trial.judge.evaluated / (routes * len(trial.rows_N)))
    return OracleResult(
        budgets=list(limits),
        nll=nll,
        route_ids=route_ids,
        random_nll=None,
        resampled_nll=None,
        resampled_score=None,
        evaluated_share=share,
    )
