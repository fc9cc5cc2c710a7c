"""All searches by name, and how far the approximate ones fall short of the exact one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

from torch import Tensor

from duollm.models.modeling_duo import DuoForCausalLM
from duollm.oracle.beam import beam_search
from duollm.oracle.local import local_search
from duollm.oracle.result import OracleResult
from duollm.oracle.sampled import sampled_search
from duollm.oracle.search import search_oracle
from duollm.routes.space import RouteSpace

Search = Callable[..., OracleResult]

SEARCHES: dict[str, Search] = {
    "exact": search_oracle,
    "beam": beam_search,
    "local": local_search,
    "sampled": sampled_search,
}

_AS_GOOD = 1e-4


@dataclass(frozen=True)
class Shortfall:
    """How far one search falls short of the exact one under one budget.

    Attributes:
        name: of the search.
        big: the budget, exactly so many big layers.
        recall: share of tokens whose route is as good as the best one, to 1e-4 nats.
        excess: mean nll above the best, nats.
        seconds: of the whole search, all budgets together.
    """

    name: str
    big: int
    recall: float
    excess: float
    seconds: float


def compare_with_exact(
    model: DuoForCausalLM,
    input_ids: Tensor,
    space: RouteSpace,
    context: str,
    big_layers: Sequence[int],
    searches: Mapping[str, Search] = SEARCHES,
) -> list[Shortfall]:
    """Run searches and compare what they find, a row per search and budget.

    Args:
        searches: by name; options are given with functools.partial. Default: all with theirs.

    In context "committed" searches commit to different routes, so one may beat the exact one later on.
    """
    exact = search_oracle(model, input_ids, space, context, big_layers)
    rows = []
    for name, search in searches.items():
        start = perf_counter()
        found = search(model, input_ids, space, context, big_layers)
        seconds = perf_counter() - start
        for big, nll, best in zip(exact.big_layers, found.nll, exact.nll, strict=True):
            excess = (nll - best)[~best.isnan()]
            recall = (excess <= _AS_GOOD).float().mean().item()
            rows.append(Shortfall(name, big, recall, excess.mean().item(), seconds))
    return rows
