"""What a search found.

Shape letters: B sequences, T tokens given, K budgets, S label pairs.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from duollm.oracle.budgets import Budget, Exactly

_PER_BUDGET = {"nll": 0, "route_ids": 0, "random_nll": 0, "resampled_nll": 1, "resampled_score": 1}
"""The tensors of a result, and which of their axes is the budgets'."""


@dataclass(frozen=True)
class OracleResult:
    """The best route of every predicted token under every budget.

    Positions whose token or label is padding hold nan (nll) and -1 (route ids).

    Attributes:
        budgets: the K budgets.
        nll: float32 [K, B, T - 1], nats.
        route_ids: int64 [K, B, T - 1].
        random_nll: float32 [K, B, T - 1], the best of N random routes; None if not asked for.
        resampled_nll: float32 [S, K, B, T - 1], the best nll of drawn labels y'; None if not asked for.
        resampled_score: the nll of the second labels y'' under the routes picked with y'. Both are less
            the labels' excess (`DrawnLabels`), which has mean zero and takes away most of the variance.
        evaluated_share: share of leaves for which the full head was run.
        changed: reference context with several rounds: per round and budget the share of tokens whose
            route changed, [rounds - 1, K].
    """

    budgets: list[Budget]
    nll: Tensor
    route_ids: Tensor
    random_nll: Tensor | None
    resampled_nll: Tensor | None
    resampled_score: Tensor | None
    evaluated_share: float
    changed: Tensor | None = None

    @property
    def big_layers(self) -> list[int]:
        """The budgets as numbers of big layers, where each is "exactly k"."""
        return [budget.big for budget in self.budgets if isinstance(budget, Exactly)]


def stack_budgets(results: list[OracleResult]) -> OracleResult:
    """Join results of one batch under different budgets."""
    return OracleResult(
        budgets=[budget for result in results for budget in result.budgets],
        evaluated_share=_mean_share(results),
        **{name: _join([getattr(result, name) for result in results], axis) for name, axis in _PER_BUDGET.items()},
    )


def join_positions(results: list[OracleResult]) -> OracleResult:
    """Join results of consecutive positions."""
    return OracleResult(
        budgets=results[0].budgets,
        evaluated_share=_mean_share(results),
        **{name: _join([getattr(result, name) for result in results], -1) for name in _PER_BUDGET},
    )


def stack_windows(results: list[OracleResult]) -> OracleResult:
    """Join results of several sequences of one length."""
    return OracleResult(
        budgets=results[0].budgets,
        evaluated_share=_mean_share(results),
        **{name: _join([getattr(result, name) for result in results], -2) for name in _PER_BUDGET},
    )


def _join(tensors: list[Tensor | None], axis: int) -> Any:
    present = [each for each in tensors if each is not None]
    return torch.cat(present, dim=axis) if present else None


def _mean_share(results: list[OracleResult]) -> float:
    return sum(result.evaluated_share for result in results) / len(results)
