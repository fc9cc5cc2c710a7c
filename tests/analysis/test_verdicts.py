from dataclasses import replace

import numpy as np
import pytest

from duollm.analysis.claims import decide_claims
from duollm.analysis.claims.evidence import Evidence
from duollm.analysis.claims.models import task_claim
from duollm.analysis.claims.oracle import fitted_change
from duollm.analysis.verdicts import (
    FITTED_CHANGE,
    SHARE,
    Claim,
    Condition,
    Reading,
    condition,
    decide,
    mean_over_seeds,
    over_seeds,
    united,
)
from duollm.models.branch import Branch
from duollm.records.bootstrap import Estimate
from hand_made_claims import claim, low


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


def test_conditions_of_several_runs_make_one_claim():
    plain = claim("C10", low("big"), low("skip", None))
    skipping = claim("C10", low("skip, router of skip, big at k = 6", 1.0), low("big", None))
    whole = united([plain, skipping])
    assert [one.quantity for one in whole.conditions] == ["big", "skip, router of skip, big at k = 6"]
    assert (plain.verdict, skipping.verdict, whole.verdict) == ("undecided", "not reproduced", "not reproduced")


def test_what_no_run_measured_stays():
    whole = united([claim("C10", low("big"), low("skip", None)), claim("C10", low("big", None), low("skip", None))])
    assert (whole.verdict, len(whole.conditions)) == ("undecided", 2)


class TestSeeds:
    def test_verdicts_that_differ_are_unstable(self):
        assert over_seeds([claim("C1", low("x")), claim("C1", low("x", 1.0))]).verdict == "unstable"
        assert over_seeds([claim("C1", low("x")), claim("C1", low("x", None))]).verdict == "reproduced"
        assert over_seeds([claim("C1", low("x", None))] * 2).verdict == "not measured"

    def test_a_condition_without_a_range_is_judged_in_each_seed(self):
        steps = [replace(low("step", value), below=None) for value in (-1.0, 1.0)]
        whole = over_seeds([claim("C4", step, low("fall")) for step in steps])
        assert [one.verdict for one in whole.conditions] == ["unstable", "reproduced"]
        assert whole.quantity == "step"

    def test_the_interval_covers_documents_and_seeds(self):
        same = mean_over_seeds([Estimate(1.0, 0.9, 1.1)] * 2)
        assert (same.value, same.low, same.high) == pytest.approx((1.0, 0.9, 1.1))
        apart = mean_over_seeds([Estimate(1.0, 0.9, 1.1), Estimate(2.0, 1.9, 2.1)])
        assert (apart.value, apart.high) == (1.5, pytest.approx(1.5 + 12.706 / 2))

    @pytest.mark.parametrize("count", [2, 3])
    def test_it_holds_the_truth_in_95_percent_of_studies(self, count):
        """Seeds scatter, documents hardly do: only Student's interval is wide enough."""
        random, held = np.random.default_rng(0), 0
        for _ in range(2000):
            seeds = [Estimate(value, value - 0.1, value + 0.1) for value in random.standard_normal(count)]
            whole = mean_over_seeds(seeds)
            held += whole.low < 0 < whole.high
        assert 0.94 < held / 2000 < 0.97

    @pytest.mark.parametrize(("labels", "cut"), [("text", True), ("drawn", True), ("net", False)])
    def test_it_is_cut_to_values_that_the_quantity_can_take(self, labels, cut):
        """Net of selection noise, a share is a difference of shares."""
        quantity, seeds = "share of documents whose first half uses big more", []
        for share in (0.15, 0.85):
            one = claim("C13", low(quantity, share, 0.1, SHARE))
            seeds.append(replace(one, readings=[Reading("shared", labels, "undecided", quantity, one.estimate)]))
        whole = over_seeds(seeds)
        assert (whole.estimate.low, whole.estimate.high) == (0, 1)
        assert (whole.readings[0].estimate == whole.estimate) == cut

    def test_every_bounded_quantity_is_known_and_its_ends_decide_nothing(self):
        claims = [*decide_claims(Evidence("prose", 12)), task_claim({})]
        claims += decide_claims(Evidence("prose", 12, router_branches=(Branch.SKIP, Branch.BIG)))
        bounded = [one for claim in claims for one in claim.conditions if one.possible]
        for one in bounded:
            assert one.above is None or one.possible[0] < one.above
            assert one.below is None or one.below < one.possible[1]
        assert next(one.possible for one in bounded if one.quantity.startswith("number")) == (0, 12)

    @pytest.mark.parametrize("layers", [2, 3, 12, 101])
    def test_no_line_through_shares_is_steeper_than_its_ends_say(self, layers):
        steepest = fitted_change((np.linspace(-1, 1, layers)[None] > 0).astype(float))
        assert 1 <= steepest[0] <= FITTED_CHANGE[1]

    def test_readings_are_compared_too(self):
        readings = [
            Reading("shared", "net", verdict, "x", Estimate(1.0, 0.9, 1.1)) for verdict in ("reproduced", "undecided")
        ]
        seeds = [replace(claim("C1", low("x")), readings=[each]) for each in readings]
        whole: Claim = over_seeds(seeds)
        assert [each.verdict for each in whole.readings] == ["unstable"]
