import numpy as np
import pytest

from duollm.analysis.verdicts import Condition, condition, decide


def _draws(low, high):
    return np.concatenate([[(low + high) / 2], np.linspace(low, high, 1001)])


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(-3, -1, "reproduced"), (-1, 1, "undecided"), (1, 3, "not reproduced")],
)
def test_below_is_judged_by_the_interval(low, high, verdict):
    judged = condition("x", _draws(low, high), below=0)
    assert (judged.verdict, judged.rule) == (verdict, "below 0")


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-0.1, 0.1, "reproduced"),
        (0.1, 0.5, "undecided"),
        (-1, 1, "undecided"),
        (0.3, 0.5, "not reproduced"),
        (-2, -1, "not reproduced"),
    ],
)
def test_between_is_judged_by_the_interval(low, high, verdict):
    judged = condition("x", _draws(low, high), above=-0.25, below=0.25)
    assert (judged.verdict, judged.rule) == (verdict, "between -0.25 and 0.25")


@pytest.mark.parametrize("draws_X", [None, np.array([np.nan, 1.0, 2.0])])
def test_what_was_not_measured_says_so(draws_X):
    judged = condition("x", draws_X, above=0)
    assert judged.verdict == "not measured"
    assert judged.estimate is None


@pytest.mark.parametrize(
    ("verdicts", "whole", "decisive"),
    [
        (["reproduced", "reproduced"], "reproduced", 0),
        (["reproduced", "undecided"], "undecided", 1),
        (["undecided", "not reproduced"], "not reproduced", 1),
        (["not measured", "not measured"], "not measured", 0),
    ],
)
def test_a_claim_is_as_good_as_its_worst_condition(verdicts, whole, decisive):
    conditions = [Condition(f"q{i}", "rule", None, verdict) for i, verdict in enumerate(verdicts)]
    claim = decide("C0", "prose", "...", "found", *conditions)
    assert claim.verdict == whole
    assert claim.quantity == f"q{decisive}"
    assert claim.conditions == conditions


def test_a_claim_of_which_a_part_was_not_measured_is_undecided_at_best():
    unmeasured, measured = condition("x", None, below=0), condition("y", _draws(-3, -1), below=0)
    assert decide("C0", "text", "x is low", "", unmeasured, measured).verdict == "undecided"
    against = condition("y", _draws(1, 3), below=0)
    assert decide("C0", "text", "x is low", "", unmeasured, against).verdict == "not reproduced"
