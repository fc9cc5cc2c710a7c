"""Best of N random routes: the baseline of every other search.

Shape letters: P routes tried side by side, G groups of tokens that try the same routes.
"""

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from duollm.models.modeling_duo import DuoForCausalLM
from duollm.oracle.approximate import Limit, Options, draw_within, search_with
from duollm.oracle.result import OracleResult
from duollm.oracle.trial import Trial
from duollm.routes.space import RouteSpace


def sampled_search(
    model: DuoForCausalLM,
    input_ids: Tensor,
    space: RouteSpace,
    context: str = "shared",
    big_layers: Sequence[int] | None = None,
    *,
    routes: int = 100,
    **options: Unpack[Options],
) -> OracleResult:
    """Find, for every predicted token, the best of random routes within each budget.

    Every token has draws of its own; in context "shared" every sequence has, in "committed" they are
    fresh at every position. A route within several budgets counts for all of them.

    Args:
        routes: how many routes to draw per budget, uniformly and with replacement.

    The other arguments are those of `search_oracle` and `Options`.

    Raises:
        ValueError: as `search_oracle`; a budget that is neither `Exactly` nor `AtMost`.
    """
    if routes < 1:
        raise ValueError(f"routes must be at least 1, got {routes}")

    def method(trial: Trial, limits: list[Limit], generator: torch.Generator) -> None:
        for limit in limits:
            trial.try_routes(draw_within(limit, space, (routes, trial.groups), generator))

    return search_with(method, model, input_ids, space, context, big_layers, **options)
