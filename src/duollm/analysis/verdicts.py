"""Decides claims by the interval of each of their conditions, in one run and over several (docs/claims.md)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import Literal

import numpy as np

from duollm.records.bootstrap import Estimate, Floats, interval

Verdict = Literal["reproduced", "not reproduced", "undecided", "not measured", "unstable"]
Labels = Literal["text", "drawn", "net"]
"""The labels that an oracle searched with: those of the text; drawn ones; those of the text, net of what the same
search gains on drawn ones."""


Range = tuple[float, float]
"""The least and the greatest value that a quantity can take."""
SHARE: Range = (0, 1)
DIFFERENCE: Range = (-1, 1)
"""Of two shares, or a correlation."""
FITTED_CHANGE: Range = (-1.5, 1.5)
"""Of a share: a least-squares line through shares of layers changes no more, however many layers there are."""


@dataclass(frozen=True)
class Condition:
    """One quantity and the rule it must meet. An estimate of None was not measured in this run.

    Attributes:
        above, below: the open range; None where it has no end. With neither, `rule` says what was judged.
        possible: the values that the quantity can take, if they end somewhere. Over seeds, intervals end there.
    """

    quantity: str
    rule: str
    estimate: Estimate | None
    verdict: Verdict
    above: float | None = None
    below: float | None = None
    possible: Range | None = None

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


_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % points of Student's t with 1, 2, ... degrees of freedom."""
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
    quantity: str,
    draws_X: Floats | None,
    *,
    above: float | None = None,
    below: float | None = None,
    possible: Range | None = None,
) -> Condition:
    """Judge a quantity by its 95 % interval against the open range (above, below)."""
    rule = f"above {above:g}" if below is None else f"below {below:g}"
    if above is not None and below is not None:
        rule = f"between {above:g} and {below:g}"
    if draws_X is None or not np.isfinite(draws_X[0]) or not np.isfinite(draws_X[1:]).any():
        return Condition(quantity, rule, None, "not measured", above, below, possible)
    return judge(Condition(quantity, rule, interval(draws_X), "undecided", above, below, possible))


def judge(one: Condition) -> Condition:
    """Decide a condition by its bounds: an interval inside them is reproduced, one wholly outside is not."""
    assert one.estimate is not None
    above, below = -np.inf if one.above is None else one.above, np.inf if one.below is None else one.below
    if above < one.estimate.low and one.estimate.high < below:
        return replace(one, verdict="reproduced")
    outside = one.estimate.high <= above or one.estimate.low >= below
    return replace(one, verdict="not reproduced" if outside else "undecided")


def united(claims: Sequence[Claim]) -> Claim:
    """Put the conditions of runs together that measure different parts of a claim.

    A condition that no run measured stays, unless it stands for those that another run measured: its quantity is then
    the beginning of theirs.
    """
    if len(claims) == 1:
        return claims[0]
    measured = {one.quantity: one for claim in claims for one in claim.conditions if one.estimate}
    missing = {one.quantity: one for claim in claims for one in claim.conditions if not one.estimate}
    missing = {name: one for name, one in missing.items() if not any(each.startswith(name) for each in measured)}
    told = [claim for claim in claims if claim.verdict != "not measured"] or list(claims[:1])
    finding = " ".join(dict.fromkeys(claim.finding for claim in told))
    first = told[0]
    whole = decide(first.id, first.domain, first.statement, finding, *measured.values(), *missing.values())
    return replace(whole, source=first.source, readings=first.readings)


def over_seeds(claims: Sequence[Claim]) -> Claim:
    """Decide a claim over seeds: the estimates are means, with an interval over documents and seeds.

    Verdicts that differ where both are measured make it unstable.
    """
    measured = [claim for claim in claims if claim.verdict != "not measured"]
    if len(measured) < 2:
        return (measured or list(claims))[0]
    seeds = [{one.quantity: one for one in claim.conditions} for claim in measured]
    conditions = [_mean([seed[name] for seed in seeds if name in seed]) for name in seeds[0]]
    first = measured[0]
    whole = decide(first.id, first.domain, first.statement, first.finding, *conditions)
    possible = {one.quantity: one.possible for one in conditions}
    readings = [_reading(reading, measured, possible) for reading in first.readings]
    verdict = _agreed([claim.verdict for claim in measured])
    return replace(whole, source=first.source, readings=readings, verdict=verdict)


def _agreed(verdicts: Sequence[Verdict]) -> Verdict:
    return verdicts[0] if len(set(verdicts)) == 1 else "unstable"


def _reading(first: Reading, claims: Sequence[Claim], possible: Mapping[str, Range | None]) -> Reading:
    """Put a reading of the first claim together with the same ones of the others."""
    every = [one for claim in claims for one in claim.readings]
    seeds = [one for one in every if (one.context, one.labels) == (first.context, first.labels)]
    same = [one.estimate for one in seeds if one.quantity == first.quantity and one.estimate]
    # Net of selection noise, a share is a difference of shares.
    ends = None if first.labels == "net" else possible.get(first.quantity)
    return replace(first, verdict=_agreed([one.verdict for one in seeds]), estimate=mean_over_seeds(same, ends))


def _mean(seeds: Sequence[Condition]) -> Condition:
    estimates = [one.estimate for one in seeds if one.estimate]
    if len(estimates) < 2:
        return next((one for one in seeds if one.estimate), seeds[0])
    whole = replace(seeds[0], estimate=mean_over_seeds(estimates, seeds[0].possible))
    if whole.above is None and whole.below is None:
        return replace(whole, verdict=_agreed([one.verdict for one in seeds]))
    return judge(whole)


def mean_over_seeds(estimates: Sequence[Estimate], possible: Range | None = None) -> Estimate:
    """Return the mean over seeds, with the wider of two intervals: over documents, and Student's over seeds.

    Over documents it is as wide as those of the seeds in the mean: seeds are studied on much the same documents.

    Args:
        possible: the least and the greatest value that the quantity can take. The interval is cut there. The truth lies
            between them, so the shorter interval holds it whenever the longer one does.
    """
    values = np.array([one.value for one in estimates])
    mean = float(values.mean())
    if len(estimates) == 1:
        return estimates[0]
    over_documents = float(np.mean([one.high - one.low for one in estimates])) / 2
    over_seeds = _STUDENT[min(len(values) - 1, len(_STUDENT)) - 1] * float(values.std(ddof=1)) / sqrt(len(values))
    half = max(over_documents, over_seeds)
    low, high = np.clip([mean - half, mean + half], *possible or (None, None)).tolist()
    return Estimate(mean, low, high)
