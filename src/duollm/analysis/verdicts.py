"""How a claim is decided: by the interval of each of its conditions, never by eye."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from duollm.analysis.statistics import Estimate, Floats, interval

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
        """The estimate with its sign turned: how far a difference lies below 0."""
        return -self.estimate if self.estimate else None

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON form; see docs/formats.md."""
        return {
            "quantity": self.quantity,
            "rule": self.rule,
            "estimate": self.estimate and self.estimate.value,
            "low": self.estimate and self.estimate.low,
            "high": self.estimate and self.estimate.high,
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class Claim:
    """A claim of the paper on one domain; it is reproduced when all of its conditions are."""

    id: str
    domain: str
    statement: str
    finding: str
    """What was measured, as one sentence."""
    conditions: tuple[Condition, ...]

    @property
    def verdict(self) -> Verdict:
        """Return "not reproduced" if any condition is, else "undecided" if any is, else "reproduced"."""
        verdicts = {condition.verdict for condition in self.conditions}
        for worst in ("not reproduced", "undecided"):
            if worst in verdicts:
                return worst
        return "reproduced"

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON form, led by the condition that decided the verdict."""
        decisive = next(one for one in self.conditions if one.verdict == self.verdict).as_dict()
        return {
            "id": self.id,
            "domain": self.domain,
            "statement": self.statement,
            "verdict": self.verdict,
            "finding": self.finding if any(one.estimate for one in self.conditions) else "Not measured in this run.",
            **{key: decisive[key] for key in ("quantity", "estimate", "low", "high")},
            "conditions": [condition.as_dict() for condition in self.conditions],
        }


def condition(
    quantity: str, draws_X: Floats | None, *, above: float = float("-inf"), below: float = float("inf")
) -> Condition:
    """Judge a quantity by its 95 % interval against the open range (above, below).

    Inside: reproduced. Wholly outside: not reproduced. Straddling, or not measured: undecided.
    """
    rule = _rule(above, below)
    if draws_X is None or not np.isfinite(draws_X[0]):
        return Condition(quantity, rule, None, "undecided")
    estimate = interval(draws_X)
    return Condition(quantity, rule, estimate, _judge(estimate, above, below))


def _judge(estimate: Estimate, above: float, below: float) -> Verdict:
    if estimate.low > above and estimate.high < below:
        return "reproduced"
    if estimate.high <= above or estimate.low >= below:
        return "not reproduced"
    return "undecided"


def _rule(above: float, below: float) -> str:
    if above == float("-inf"):
        return f"below {below:g}"
    if below == float("inf"):
        return f"above {above:g}"
    return f"between {above:g} and {below:g}"
