"""Each claim on hand-made evidence that supports it, contradicts it, or says nothing."""

from dataclasses import replace

import numpy as np
import pytest

from duollm.analysis.claims import decide_claims
from duollm.analysis.claims.evidence import Evidence
from duollm.analysis.claims.oracle import oracle_claims
from duollm.models.branch import Branch
from duollm.routes.space import focus_budgets

LAYERS = 6
PEAK = {0: 3.5, 1: 3.2, 2: 3.0, 3: 2.9, 4: 3.0, 5: 3.2, 6: 3.4}


def _draws(value, generator, spread=0.001):
    return np.concatenate([[value], generator.normal(value, spread, 400)])


def _shares(share_L, spread=0.001):
    noise_XL = np.random.default_rng(0).normal(0, spread, (401, LAYERS))
    noise_XL[0] = 0
    return np.array(share_L) + noise_XL


def _evidence(**nll_by_policy):
    """Evidence on which every claim holds, but for what is given."""
    rising, falling = np.linspace(-0.2, 0.2, LAYERS), np.linspace(0.2, -0.2, LAYERS)
    nll = {
        "oracle": PEAK,
        "static": {k: 3.5 - 0.02 * k for k in range(LAYERS + 1)},
        "best-of-100-patterns": {k: 3.5 - 0.02 * k for k in range(LAYERS + 1)},
        "linear": {k: 3.5 - 0.02 * k for k in (1, 2, 3, 4, 5)},
        "all-big": {LAYERS: 3.4},
        "oracle-ramp3to1": {2: 3.1},
        "oracle-ramp1to3": {2: 3.1},
    } | nll_by_policy
    generator = np.random.default_rng(0)
    return Evidence(
        "prose",
        LAYERS,
        nll_X={(policy, k): _draws(value, generator) for policy, by_k in nll.items() for k, value in by_k.items()},
        oracle_share_XL={2: _shares(1 / 3 + rising), 3: _shares([0.5] * LAYERS), 4: _shares(2 / 3 + falling)},
        router="linear",
    )


def _verdicts(evidence):
    return {claim.id: claim.verdict for claim in decide_claims(evidence)[:8]}


def _verdict(claim, evidence):
    return _verdicts(evidence)[claim]


def test_budgets_are_the_papers_scaled_to_the_depth():
    assert focus_budgets(12) == (4, 6, 8)
    assert focus_budgets(6) == (2, 3, 4)


def test_all_hold_where_they_should():
    assert set(_verdicts(_evidence()).values()) == {"reproduced"}


def test_without_evidence_nothing_is_measured_and_a_reason_is_given():
    claims = decide_claims(Evidence("prose", LAYERS))
    assert [claim.id for claim in claims] == [f"C{number}" for number in range(1, 20)]
    assert {claim.verdict for claim in claims} == {"not measured"}
    assert all(claim.finding.startswith("Not measured: it takes ") and claim.source for claim in claims)


def test_where_the_oracle_may_skip_only_c9_is_decided():
    claims = decide_claims(replace(_evidence(), branches=(Branch.SKIP, Branch.BIG)))
    assert {claim.id for claim in claims if claim.verdict != "not measured"} == {"C9"}


@pytest.mark.parametrize(
    ("share_L", "verdict"),
    [
        ([0.9, 0.2, 0.5, 0.3, 0.8, 0.3], "reproduced"),
        ([0.5] * LAYERS, "not reproduced"),
        ([1, 1, 1, 0, 0, 0], "not reproduced"),  # an early exit
    ],
)
def test_c9_needs_uneven_layers_that_are_no_early_exit(share_L, verdict):
    share_XL = _shares(share_L)
    evidence = Evidence("prose", LAYERS, (Branch.SKIP, Branch.BIG), oracle_share_XL={3: share_XL})
    evidence = replace(evidence, oracle_spread_X=np.ptp(share_XL, axis=1))
    assert decide_claims(evidence)[8].verdict == verdict


def test_c1_fails_if_the_oracle_is_no_better_than_patterns():
    assert _verdict("C1", _evidence(oracle=PEAK | {2: 3.6})) == "not reproduced"


@pytest.mark.parametrize("router", [3.2, 3.8])
def test_c1_fails_if_the_router_is_far_from_the_best_of_100(router):
    assert _verdict("C1", _evidence(linear={2: router})) == "not reproduced"


def test_c1_is_undecided_without_a_router():
    assert _verdict("C1", replace(_evidence(), router=None)) == "undecided"


def test_c1_places_the_router_where_it_spends():
    """The router is as good as the best of 100 at the 2.5 layers it spends, far below it at the nominal 2."""
    steep = {k: 3.5 - 0.4 * k for k in range(LAYERS + 1)}
    oracle = {k: nll - 0.2 for k, nll in steep.items()}
    evidence = _evidence(**{"best-of-100-patterns": steep, "oracle": oracle, "linear": {2: steep[2] - 0.2}})
    assert _verdict("C1", evidence) == "not reproduced"
    spending = replace(evidence, router_spent_X={2: np.full(401, 2.5)})
    claim = decide_claims(spending)[0]
    assert claim.verdict == "reproduced"
    assert "at the 2.50 big layers it spends" in claim.finding
    beyond_the_searched = replace(evidence, router_spent_X={2: np.full(401, LAYERS + 0.5)})
    assert "the router goes at k = 2" in decide_claims(beyond_the_searched)[0].finding


@pytest.mark.parametrize("ramp", ["oracle-ramp3to1", "oracle-ramp1to3"])
@pytest.mark.parametrize(("nll", "verdict"), [(2.9, "not reproduced"), (3.0, "undecided"), (3.1, "reproduced")])
def test_c5_needs_both_ramps_to_be_worse(ramp, nll, verdict):
    assert _verdict("C5", _evidence(**{ramp: {2: nll}})) == verdict


def test_c5_is_the_papers_at_its_depth():
    paper = decide_claims(Evidence("prose", 12))[4]
    assert paper.statement.startswith("A constant 4 big layers per token beats sliding from 6 to 2 or from 2 to 6")


def test_c2_fails_if_the_loss_keeps_falling():
    assert _verdict("C2", _evidence(oracle={k: 3.5 - 0.1 * k for k in range(LAYERS + 1)})) == "not reproduced"


def test_c2_fails_if_the_lowest_budget_is_not_in_the_middle():
    assert _verdict("C2", _evidence(oracle=PEAK | {1: 2.5})) == "not reproduced"


def test_c3_fails_if_all_big_is_better():
    assert _verdict("C3", _evidence(oracle=PEAK | {1: 3.45})) == "not reproduced"


def test_c3_is_undecided_where_the_interval_straddles():
    assert _verdict("C3", _evidence(oracle=PEAK | {1: 3.4})) == "undecided"


def test_c4_fails_on_a_single_sure_rise():
    static = {k: 3.5 - 0.02 * k for k in range(LAYERS + 1)} | {3: 3.5}
    claim = next(claim for claim in decide_claims(_evidence(static=static)) if claim.id == "C4")
    assert claim.verdict == "not reproduced"
    assert "rises from k = 2 to 3" in claim.finding


def test_c4_forgives_a_rise_within_the_interval():
    flat = {k: 3.5 - 0.02 * k for k in range(LAYERS + 1)} | {3: 3.46 + 1e-5}
    assert _verdict("C4", _evidence(static=flat)) == "reproduced"


def test_c4_needs_a_drop_from_end_to_end():
    assert _verdict("C4", _evidence(linear={1: 3.4, 5: 3.4})) == "undecided"


def test_layer_claims_swap_when_depth_is_turned_over():
    evidence = _evidence()
    turned = {k: share_XL[:, ::-1] for k, share_XL in evidence.oracle_share_XL.items()}
    verdicts = _verdicts(replace(evidence, oracle_share_XL=turned))
    assert (verdicts["C6"], verdicts["C7"], verdicts["C8"]) == ("not reproduced", "reproduced", "not reproduced")


def test_c7_fails_on_one_uneven_layer():
    evidence = _evidence()
    uneven = evidence.oracle_share_XL | {3: _shares([0.8, 0.44, 0.44, 0.44, 0.44, 0.44])}
    assert _verdict("C7", replace(evidence, oracle_share_XL=uneven)) == "not reproduced"


def test_slope_is_the_difference_between_last_and_first_layer():
    claim = next(claim for claim in decide_claims(_evidence()) if claim.id == "C6")
    assert claim.conditions[0].estimate.value == pytest.approx(0.4)


def test_findings_print_the_numbers_of_the_conditions():
    findings = {claim.id: claim.finding for claim in decide_claims(_evidence())[:8]}
    assert "k = 2 the oracle lies 0.460 [" in findings["C1"]
    assert "From k = 0 to 3 it falls by 0.600 [" in findings["C2"]
    assert "lowest at k = 3 [3, 3] (the claim allows 1.5 to 4.5)" in findings["C2"]
    assert "changes by 0.400 [" in findings["C6"]


def test_findings_say_what_is_not_steady():
    static = {k: 3.5 - 0.02 * k for k in range(LAYERS + 1)} | {3: 3.5}
    finding = next(claim.finding for claim in decide_claims(_evidence(static=static)) if claim.id == "C4")
    assert finding.startswith("Best fixed pattern: falls by 0.120 [")
    assert finding.count("but it rises") == 1


def test_c12_names_differences_of_either_sign():
    random = np.random.default_rng(0)
    both_X = _draws(-1.23, random), _draws(0.05, random)
    found = oracle_claims(Evidence("code", LAYERS, line_starts_X=both_X))[-1]
    assert "minus that of others is \N{MINUS SIGN}1.230 [" in found.finding
    assert found.finding.endswith("minus that of others, is 5% [5%, 5%].")
