from itertools import pairwise

import numpy as np
import pytest

from duollm.analysis.layers import position_edges, share_by_position
from duollm.records.bootstrap import Bootstrap
from duollm.records.tokens import read_tokens
from picking import pick


class TestLayerUse:
    def test_shares_equal_the_truth(self, compared):
        _, truths, results = compared
        is_big_TL = truths["prose"].space.decode(truths["prose"].router_route_T[2]) == 2
        row = pick(results.layer_use, domain="prose", policy="linear-k2")
        np.testing.assert_allclose([share.value for share in row.share_by_layer], is_big_TL.mean(0))
        assert np.shape(row.share_by_layer_and_position) == (6, 8)
        assert {row.policy for row in results.layer_use if not row.kind} == {"oracle"}

    def test_shares_by_position_equal_a_plain_loop_in_every_draw(self, compared):
        run, _, _ = compared
        tokens = read_tokens(run, "code")[0]
        bootstrap = Bootstrap([np.bincount(tokens.document_T)], samples=20, seed=3)
        key = next(key for key in tokens.routers() if key.big_layers == 2)
        edges = position_edges(tokens.position_T)
        share_XPL = share_by_position(tokens, key, edges, bootstrap)
        is_big_TL = tokens.policies[key].routes_TL == 2
        for x, weights_D in enumerate(bootstrap.weights_XD):
            for p, (first, end) in enumerate(pairwise(edges)):
                weight_T = weights_D[tokens.document_T] * ((tokens.position_T >= first) & (tokens.position_T < end))
                np.testing.assert_allclose(share_XPL[x, p], np.average(is_big_TL, axis=0, weights=weight_T))

    def test_edges_cover_every_position_once(self):
        edges = position_edges(np.arange(1, 128))
        assert (len(edges), edges[0], edges[-1]) == (9, 1, 128)
        assert np.diff(edges).min() >= 15

    def test_short_windows_have_a_bin_per_position(self):
        assert position_edges(np.array([1, 2, 3, 1])).tolist() == [1, 2, 3, 4]


class TestAgreement:
    def test_it_equals_the_truth_and_lies_above_chance_where_it_was_planted(self, compared):
        _, truths, results = compared
        truth, row = truths["prose"], pick(results.agreement, domain="prose", policy="gains_k3_exact")
        ids = truth.space.ids_with(big=3)
        picked_TL = truth.space.decode(ids[truth.nll_TR[:, ids].argmin(1)])
        taken_TL = truth.space.decode(truth.good_route_T[3, "exact"])
        same_L = [share.value for share in row.share_by_layer]
        np.testing.assert_allclose(same_L, (picked_TL == taken_TL).mean(0))
        picked_L, taken_L = (picked_TL == 2).mean(0), (taken_TL == 2).mean(0)
        chance_L = picked_L * taken_L + (1 - picked_L) * (1 - taken_L)
        np.testing.assert_allclose(row.share_if_independent_by_layer, chance_L)
        assert row.share == pytest.approx((picked_TL == taken_TL).mean())
        assert row.over_independent.value == pytest.approx(row.share - row.share_if_independent)
        assert row.over_independent.low > 0.15
        random = pick(results.agreement, domain="pooled", policy="linear-k3").over_independent
        assert random.low < 0 < random.high < 0.05

    def test_pooled_counts_all_tokens(self, compared):
        _, truths, results = compared
        shares = {
            row.domain: [share.value for share in row.share_by_layer]
            for row in results.agreement
            if row.policy == "gains_k2"
        }
        np.testing.assert_allclose(shares["pooled"], np.mean([shares[domain] for domain in truths], axis=0))
