import numpy as np
import pytest


def test_agreement_equals_the_truth_and_lies_above_chance_where_it_was_planted(compared):
    _, truths, results = compared
    truth, rows = truths["prose"], {(row["domain"], row["policy"]): row for row in results["agreement"]}
    ids = truth.space.ids_with(big=3)
    picked_TL = truth.space.decode(ids[truth.nll_TR[:, ids].argmin(1)])
    taken_TL = truth.space.decode(truth.good_route_T[3, "exact"])
    row = rows["prose", "gains_k3_exact"]
    np.testing.assert_allclose(row["share_by_layer"], (picked_TL == taken_TL).mean(0))
    picked_L, taken_L = (picked_TL == 2).mean(0), (taken_TL == 2).mean(0)
    chance_L = picked_L * taken_L + (1 - picked_L) * (1 - taken_L)
    np.testing.assert_allclose(row["share_if_independent_by_layer"], chance_L)
    assert row["share"] == pytest.approx((picked_TL == taken_TL).mean())
    assert row["over_independent"] == pytest.approx(row["share"] - row["share_if_independent"])
    assert row["over_independent_low"] > 0.15
    random = rows["pooled", "linear-k3"]
    assert random["over_independent_low"] < 0 < random["over_independent_high"] < 0.05


def test_pooled_counts_all_tokens(compared):
    _, truths, results = compared
    rows = {row["domain"]: row for row in results["agreement"] if row["policy"] == "gains_k2"}
    parts = [rows[domain]["share_by_layer"] for domain in truths]
    np.testing.assert_allclose(rows["pooled"]["share_by_layer"], np.mean(parts, axis=0))
