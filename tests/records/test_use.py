from types import SimpleNamespace

import numpy as np
import pytest

from duollm.records.bootstrap import sum_by_document
from duollm.records.keys import Key
from duollm.records.use import HALVES, SKIPPED_AGAIN, correlation, halves, moments, window_sums, within

KEY = Key("linear_k1", 1, "linear")


def policy(random, documents=3, windows=4, length=19, layers=2):
    """Routes [W, T, L] in order of document, window and position; the first window of the last document is short."""
    document_T = np.repeat(np.arange(documents), windows * length)
    window_T = np.tile(np.repeat(np.arange(windows), length), documents)
    position_T = np.tile(np.arange(1, length + 1), documents * windows)
    kept_T = ~((document_T == 2) & (window_T == 0) & (position_T > 3))
    routes_TL = random.integers(0, 3, (len(document_T), layers))[kept_T]
    tokens = SimpleNamespace(
        document_T=document_T[kept_T],
        window_T=window_T[kept_T],
        position_T=position_T[kept_T],
        documents=["a", "b", "c"],
    )
    return tokens, SimpleNamespace(routes_TL=routes_TL)


def test_sums_equal_a_plain_loop():
    tokens, one = policy(np.random.default_rng(0))
    sums = window_sums(tokens, KEY, one)
    for document in range(3):
        pairs = []
        for window in range(4):
            mine_T = (tokens.document_T == document) & (tokens.window_T == window)
            first_TL, second_TL = (
                one.routes_TL[mine_T & half_T] for half_T in (tokens.position_T <= 10, tokens.position_T > 10)
            )
            if len(second_TL):
                pairs.append([(first_TL == 0).mean(0), (second_TL == 0).mean(0)])
        pairs_W2L = np.array(pairs)
        of_document_LM = sums[SKIPPED_AGAIN, KEY][document]
        assert of_document_LM[:, 0].tolist() == [len(pairs)] * 2
        np.testing.assert_allclose(of_document_LM[:, 5], (pairs_W2L[:, 0] * pairs_W2L[:, 1]).sum(0))
        expected = [np.corrcoef(pairs_W2L[:, :, layer].T)[0, 1] for layer in range(2)]
        np.testing.assert_allclose(correlation(of_document_LM), expected)
        late_TL = one.routes_TL[(tokens.document_T == document) & (tokens.position_T > 10)]
        np.testing.assert_array_equal(sums[HALVES, KEY][document, 1, :, 2], (late_TL == 2).sum(0))


def test_halves_differ_by_one_token_at_most():
    for length in (2, 7, 8, 63):
        half_T = halves(np.arange(1, length + 1))
        assert 0 <= np.sum(half_T == 0) - np.sum(half_T == 1) <= 1
        assert (np.diff(half_T) >= 0).all()


def test_all_layers_together_equal_one_list_of_pairs():
    random = np.random.default_rng(1)
    first_WL, second_WL = random.random((2, 50, 3))
    summed_M = moments(first_WL, second_WL).sum((0, 1))
    assert correlation(summed_M) == pytest.approx(np.corrcoef(first_WL.ravel(), second_WL.ravel())[0, 1])


def test_within_takes_out_what_layers_have_in_common():
    """Windows differ in nothing, layers do: all of the correlation is between layers."""
    random = np.random.default_rng(2)
    layer_L = np.linspace(0, 1, 6)
    first_WL, second_WL = layer_L + 0.05 * random.standard_normal((2, 200, 6))
    summed_LM = moments(first_WL, second_WL).sum(0)
    assert correlation(summed_LM.sum(0)) > 0.9
    assert abs(correlation(within(summed_LM))) < 0.1
    centred = [each - each.mean(0) for each in (first_WL, second_WL)]
    expected = np.corrcoef(centred[0].ravel(), centred[1].ravel())[0, 1]
    assert correlation(within(summed_LM)) == pytest.approx(expected)


def test_a_constant_has_no_correlation():
    assert np.isnan(correlation(moments(np.zeros(5), np.arange(5.0)).sum(0)))


def test_pairs_that_lack_one_side_count_for_nothing():
    pairs_M = moments(np.array([0.5, np.nan]), np.array([0.5, 0.1]))
    assert sum_by_document(pairs_M, np.zeros(2, dtype=int), 1)[0, 0] == 1
