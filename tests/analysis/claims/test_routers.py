"""What the simulation does not show: parts of claims that need another run, and what findings say."""

import numpy as np
import pytest

from duollm.analysis.claims.evidence import Evidence
from duollm.analysis.claims.routers import router_claims
from duollm.analysis.layers import RouterUse
from duollm.models.branch import Branch

LAYERS = 6


def draws(value):
    return np.concatenate([[value], np.linspace(value - 0.001, value + 0.001, 101)])


def use(branch, slope=0.4, early=0.1, documents=0.8, again=0.5):
    share_XLC = np.zeros((102, LAYERS, 3))
    share_XLC[:, :, branch] = 0.5 + np.linspace(-slope / 2, slope / 2, LAYERS)
    return RouterUse(share_XLC, draws(early), draws(documents), draws(again), draws(0.1))


def claims(branches, by_budget, **given):
    evidence = Evidence("prose", LAYERS, router="linear", router_branches=branches, use=by_budget, **given)
    return {claim.id: claim for claim in router_claims(evidence)}


PLAIN = claims((Branch.SMALL, Branch.BIG), {k: use(Branch.BIG) for k in (2, 3, 4)})
SKIPPING = claims((Branch.SKIP, Branch.BIG), {3: use(Branch.SKIP)})


def test_a_run_without_skip_leaves_the_skipping_router_open():
    assert [PLAIN[name].verdict for name in ("C10", "C13", "C16", "C17")] == [
        *("undecided", "undecided", "not measured", "not measured"),
    ]
    missing = [one.quantity for one in PLAIN["C10"].conditions if not one.estimate]
    assert missing == ["share of skip, last - first layer on a fitted line"]


def test_a_run_with_skip_leaves_the_other_router_open():
    assert [SKIPPING[name].verdict for name in ("C10", "C13", "C17")] == ["undecided", "undecided", "reproduced"]
    measured = [one.quantity for one in SKIPPING["C10"].conditions if one.estimate]
    assert measured == ["share of skip, last - first layer on a fitted line, router of skip, big at k = 3"]


def test_what_is_missing_in_one_run_begins_what_the_other_measured():
    """By this `united` knows that it is not missing."""
    for one, other in ((PLAIN, SKIPPING), (SKIPPING, PLAIN)):
        for name in ("C10", "C13"):
            measured = [condition.quantity for condition in other[name].conditions if condition.estimate]
            for condition in one[name].conditions:
                assert condition.estimate or any(each.startswith(condition.quantity) for each in measured)


def test_findings_tell_all_budgets_together():
    assert PLAIN["C13"].finding == (
        "Router linear (the paper's kind): share of documents whose first half uses big more, router of small, big: "
        "80% [80%, 80%] at k = 2, 80% [80%, 80%] at k = 3."
    )
    assert "after each layer's mean is taken out: 0.100 [0.099, 0.101] at k = 3" in SKIPPING["C17"].finding
    other = Evidence("prose", LAYERS, router="gains", use={2: use(Branch.BIG)})
    assert router_claims(other)[0].finding.startswith("Router gains (as there is no linear one, the paper's kind): ")


def test_a_fitted_line_that_leaves_the_range_of_shares_is_explained():
    for slope, explained in ((0.9, False), (1.2, True)):
        found = claims((Branch.SMALL, Branch.BIG), {k: use(Branch.BIG, slope=slope) for k in (2, 3, 4)})
        assert ("A fitted line can change by more than 1" in found["C10"].finding) == explained


def test_a_missing_focus_budget_leaves_c10_undecided():
    found = claims((Branch.SMALL, Branch.BIG), {2: use(Branch.BIG)})
    missing = [one.quantity for one in found["C10"].conditions if not one.estimate]
    assert sum("at k = 3" in quantity for quantity in missing) == 2


def test_c16_is_c10_of_an_opt_like_model():
    opt = claims((Branch.SMALL, Branch.BIG), {k: use(Branch.BIG) for k in (2, 3, 4)}, like_opt=True)
    assert opt["C16"].conditions == opt["C10"].conditions


@pytest.mark.parametrize(("area", "verdict"), [(0.1, "reproduced"), (0.096, "reproduced"), (0.09, "not reproduced")])
def test_c19_compares_with_the_best_other_router(area, verdict):
    areas = {kind: draws(value) for kind, value in {"knn": area, "linear": 0.02, "gains": 0.1}.items()}
    found = claims((Branch.SMALL, Branch.BIG), {}, area_X=areas)
    assert found["C19"].verdict == verdict
    assert "than gains, the best other router" in found["C19"].finding
