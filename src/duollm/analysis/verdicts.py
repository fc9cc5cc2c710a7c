"""Decides claims by the interval of each of their conditions."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from duollm.records.bootstrap import Estimate, Floats, interval

Verdict = Literal["reproduced", "not reproduced", "undecided"]


@dataclass(frozen=True)
class Condition:
    """One quantity and the rule it must meet. An estimate of None was not measured in this run."""

    quantity: str
    rule: str
    estimate: Estimate | None
    verdict: Verdict

    @property
    def drop(self) -> Estimate | None:
        """The estimate with its sign changed: how far a difference lies below 0."""
        return -self.estimate if self.estimate else None


@dataclass(frozen=True)
class Claim:
    """A claim of the paper in one domain, led by the condition that decided its verdict."""

    id: str
    domain: str
    statement: str
    verdict: Verdict
    finding: str
    """What was measured, as one sentence."""
    quantity: str
    estimate: Estimate | None
    conditions: list[Condition]


def decide(name: str, domain: str, statement: str, finding: str, *conditions: Condition) -> Claim:
    """Return a claim whose verdict is that of its worst condition: not reproduced, undecided, reproduced."""
    worst_first: tuple[Verdict, ...] = ("not reproduced", "undecided", "reproduced")
    decisive = min(conditions, key=lambda one: worst_first.index(one.verdict))
    if not any(one.estimate for one in conditions):
        finding = "Not measured in this run."
    return Claim(
        name, domain, statement, decisive.verdict, finding, decisive.quantity, decisive.estimate, list(conditions)
    )


def condition(
    quantity: str, draws_X: Floats | None, *, above: float = float("-inf"), below: float = float("inf")
) -> Condition:
    """Judge a quantity by its 95 % interval against the open range (above, below).

    An interval inside the range is reproduced, one wholly outside is not; any other, or none, is undecided.
    """
    rule = f"above {above:g}" if below == float("inf") else f"below {below:g}"
    if float("-inf") < above < below < float("inf"):
        rule = f"between {above:g} and {below:g}"
    if draws_X is None or not np.isfinite(draws_X[0]):
        return Condition(quantity, rule, None, "undecided")
    estimate = interval(draws_X)
    if estimate.low > above and estimate.high < below:
        return Condition(quantity, rule, estimate, "reproduced")
    outside = estimate.high <= above or estimate.low >= below
    return Condition(quantity, rule, estimate, "not reproduced" if outside else "undecided")
