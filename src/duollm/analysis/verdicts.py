"""Decides claims by the interval of each of their conditions (docs/claims.md)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from duollm.records.bootstrap import Estimate, Floats, interval

Verdict = Literal["reproduced", "not reproduced", "undecided", "not measured", "unstable"]
Labels = Literal["text", "drawn", "net"]
"""The labels that an oracle searched with: those of the text; drawn ones; those of the text, net of what the same
search gains on drawn ones."""


@dataclass(frozen=True)
class Condition:
    """One quantity and the rule it must meet. An estimate of None was not measured in this run.

    Attributes:
        above, below: the open range; None where it has no end. With neither, `rule` says what was judged.
    """

    quantity: str
    rule: str
    estimate: Estimate | None
    verdict: Verdict
    above: float | None = None
    below: float | None = None

    @property
    def drop(self) -> Estimate | None:
        """The estimate with its sign changed: how far a difference lies below 0."""
        return -self.estimate if self.estimate else None


@dataclass(frozen=True)
class Reading:
    """The verdict on a claim about the oracle in one context and for one kind of labels."""

    context: str
    labels: Labels
    verdict: Verdict
    quantity: str
    estimate: Estimate | None


@dataclass(frozen=True)
class Claim:
    """A claim in one domain, led by the condition that decided its verdict.

    Attributes:
        finding: what was measured, as one sentence.
        source: where the claim is made: a figure of the paper, or another paper.
        readings: of a claim about the oracle, its verdict in every context and for all kinds of labels.
    """

    id: str
    domain: str
    statement: str
    verdict: Verdict
    finding: str
    quantity: str
    estimate: Estimate | None
    conditions: list[Condition]
    source: str = ""
    readings: Sequence[Reading] = ()


_WORST_FIRST: tuple[Verdict, ...] = ("not reproduced", "unstable", "undecided", "not measured", "reproduced")


def decide(name: str, domain: str, statement: str, finding: str, *conditions: Condition) -> Claim:
    """Return a claim whose verdict is that of its worst condition.

    A claim of which some conditions were not measured is at best undecided.
    """
    decisive = min(conditions, key=lambda one: _WORST_FIRST.index(one.verdict))
    verdict = decisive.verdict
    if verdict == "not measured" and any(one.estimate for one in conditions):
        verdict = "undecided"
    return Claim(name, domain, statement, verdict, finding, decisive.quantity, decisive.estimate, list(conditions))


def condition(
    quantity: str, draws_X: Floats | None, *, above: float | None = None, below: float | None = None
) -> Condition:
    """Judge a quantity by its 95 % interval against the open range (above, below)."""
    rule = f"above {above:g}" if below is None else f"below {below:g}"
    if above is not None and below is not None:
        rule = f"between {above:g} and {below:g}"
    if draws_X is None or not np.isfinite(draws_X[0]) or not np.isfinite(draws_X[1:]).any():
        return Condition(quantity, rule, None, "not measured", above, below)
    return judge(Condition(quantity, rule, interval(draws_X), "undecided", above, below))


def judge(one: Condition) -> Condition:
    """Decide a condition by its bounds: an interval inside them is reproduced, one wholly outside is not."""
    assert one.estimate is not None
    above, below = -np.inf if one.above is None else one.above, np.inf if one.below is None else one.below
    if above < one.estimate.low and one.estimate.high < below:
        return replace(one, verdict="reproduced")
    outside = one.estimate.high <= above or one.estimate.low >= below
    return replace(one, verdict="not reproduced" if outside else "undecided")
