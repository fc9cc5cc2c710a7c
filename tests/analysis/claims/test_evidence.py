"""What is gathered from a run equals what its truth says."""

import numpy as np
import pytest

from duollm.analysis.claims.evidence import contexts, gather_evidence, readings, studied_router
from duollm.models.branch import Branch
from duollm.records.keys import ALL_BIG, BEST_PATTERNS, ORACLE, STATIC
from duollm.records.patterns import first_half, read_patterns
from duollm.records.records import Draws, records_of_oracle_text
from duollm.records.tokens import read_tokens

SMALL_BIG = (Branch.SMALL, Branch.BIG)


@pytest.fixture(scope="module")
def gathered(compared):
    run, truths, _ = compared
    tokens, _ = read_tokens(run, "prose")
    draws = Draws(records_of_oracle_text(tokens, read_patterns(run, tokens), 0), 20, 0)
    evidence = gather_evidence(draws, draws, SMALL_BIG)
    return tokens, truths["prose"], draws, evidence, {(one[0], one[1]): one[2] for one in readings(evidence, draws)}


def test_the_router_that_claims_are_about_is_the_papers_or_the_first_by_name():
    assert studied_router(["gains", "linear", None]) == "linear"
    assert studied_router(["knn", "gains", None]) == "gains"
    assert studied_router([None]) is None


def test_use_of_branches_equals_a_plain_loop(gathered):
    _, truth, _, evidence, _ = gathered
    assert (evidence.router, sorted(evidence.use)) == ("linear", [1, 2, 3, 4, 5])
    assert evidence.router_branches == SMALL_BIG
    is_big_TL = truth.space.decode(truth.router_route_T[2]) == Branch.BIG
    early_T = truth.position_T <= 10
    use = evidence.use[2]
    np.testing.assert_allclose(use.share_XLC[0, :, Branch.BIG], is_big_TL.mean(0))
    assert use.early_X[0] == pytest.approx(is_big_TL[early_T].mean() - is_big_TL[~early_T].mean())
    more = [
        np.sign(is_big_TL[early_T & mine_T].mean() - is_big_TL[~early_T & mine_T].mean())
        for mine_T in (truth.document_T == document for document in range(8))
    ]
    assert use.documents_X[0] == pytest.approx((np.mean(more) + 1) / 2)
    assert np.isnan(use.again_X[0])  # nothing is skipped


def test_areas_are_those_of_routers_that_spend_on_average(gathered):
    assert list(gathered[3].area_X) == ["gains", "linear"]


def test_every_context_has_the_labels_that_were_searched(gathered):
    _, _, draws, _, found = gathered
    assert contexts(draws) == ["shared", "committed"]
    assert found["shared", "text"].budgets(ORACLE) == list(range(7))
    assert found["committed", "text"].budgets(ORACLE) == [2]
    assert found["committed", "drawn"].budgets(ORACLE) == []
    text, committed = (found[context, "text"].nll(ORACLE, 2) for context in ("shared", "committed"))
    np.testing.assert_allclose(committed - text, 0.2, atol=1e-6)


def test_net_of_noise_the_oracle_pays_what_drawn_labels_gain(gathered):
    tokens, _, _, evidence, found = gathered
    gain_T = tokens.file.floats("expected_static_k2") - tokens.file.floats("resampled_nll_shared_k2")
    net = found["shared", "net"]
    difference_X = net.nll(ORACLE, 2) - evidence.nll(ORACLE, 2)
    assert difference_X[0] == pytest.approx(gain_T.mean())
    np.testing.assert_array_equal(net.nll(STATIC, 2), evidence.nll(STATIC, 2))


def test_on_drawn_labels_static_is_expected_and_no_router_is_known(gathered):
    tokens, _, _, _, found = gathered
    drawn = found["shared", "drawn"]
    for policy, k in ((STATIC, 3), (BEST_PATTERNS, 3), (ALL_BIG, 6)):
        assert drawn.nll(policy, k)[0] == pytest.approx(tokens.file.floats(f"expected_static_k{k}").mean())
    assert drawn.nll(ORACLE, 3)[0] == pytest.approx(tokens.file.floats("resampled_nll_shared_k3").mean())
    assert drawn.router is None


def test_layers_net_of_noise_are_a_difference_around_even_use(gathered):
    tokens, _, _, _, found = gathered
    share_of = {labels: found["shared", labels].oracle_share_XL[3][0] for labels in ("text", "drawn", "net")}
    picked_TL = tokens.space.decode(tokens.file.integers("resampled_route_shared_k3")) == Branch.BIG
    np.testing.assert_allclose(share_of["drawn"], picked_TL.mean(0))
    np.testing.assert_allclose(share_of["net"], share_of["text"] - share_of["drawn"] + 0.5)


def test_the_most_and_least_used_layers_are_chosen_on_the_other_half_in_every_resample(gathered):
    tokens, truth, draws, _, _ = gathered
    is_big_TL = tokens.oracle(3).routes_TL == Branch.BIG
    big_DL = np.stack([is_big_TL[truth.document_T == document].sum(0) for document in range(8)])
    in_first_D = first_half(8, 0)
    spread_X = gather_evidence(draws, draws, SMALL_BIG).oracle_spread_X
    for draw, weight_D in enumerate(draws.bootstrap.weights_XD):
        total = 0.0
        for half in (True, False):
            chosen_L, scored_L = (weight_D[in_first_D == one] @ big_DL[in_first_D == one] for one in (not half, half))
            total += scored_L[chosen_L.argmax()] - scored_L[chosen_L.argmin()]
        assert spread_X[draw] == pytest.approx(total / (weight_D @ draws.records.tokens_D))
