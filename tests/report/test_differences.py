import numpy as np
import pytest

from duollm.analysis.tables import read_oracle, read_routers
from duollm.report.differences import differing_passages


@pytest.fixture
def tables(compared):
    oracle = read_oracle(compared[0], "prose")
    return oracle, {router.name: router for router in read_routers(compared[0], oracle)}


def test_the_worst_windows_come_first(tables):
    oracle, routers = tables
    router = routers["gains_k3"]
    first, second = differing_passages(oracle, router, 2)
    loss_T = router.nll_T - oracle.nll_oracle_T[3]
    means = [loss_T[oracle.document_T == document].mean() for document in range(8)]
    worst = np.argsort(means)[::-1]
    assert [first.document, second.document] == [oracle.documents[document] for document in worst[:2]]
    assert (first.router, first.big_layers, len(first.tokens)) == ("gains", 3, 20)


def test_long_windows_are_cut_to_the_stretch_that_loses_most(tables, monkeypatch):
    monkeypatch.setattr("duollm.report.differences._LENGTH", 5)
    oracle, routers = tables
    router = routers["linear-k3"]
    [passage] = differing_passages(oracle, router, 1)
    loss_T = (router.nll_T - oracle.nll_oracle_T[3]).reshape(8, 20)
    stretches = np.lib.stride_tricks.sliding_window_view(loss_T, 5, axis=1).mean(2)
    document, start = np.unravel_index(stretches.argmax(), stretches.shape)
    shades = np.clip(loss_T[document, start : start + 5] / passage.loss_full, 0, 1)
    np.testing.assert_allclose([token.loss_shade for token in passage.tokens], shades, atol=0.006)


def test_shades_of_spending_have_the_sign_of_the_difference(tables):
    oracle, routers = tables
    rows = np.flatnonzero(oracle.document_T == 0)
    passage = next(one for one in differing_passages(oracle, routers["gains_k3"], 8) if one.document == "prose/00.txt")
    more_T = oracle.space.count_big(routers["gains_k3"].route_T[rows]) - 3
    assert np.sign([token.spend_shade for token in passage.tokens]).tolist() == np.sign(more_T).tolist()
    assert {-1, 0, 1} == set(np.sign(more_T).tolist())
    exact = differing_passages(oracle, routers["gains_k3_exact"], 1)[0]
    assert all(token.spend_shade == 0 for token in exact.tokens)
    assert "+0 big layers" in exact.tokens[0].numbers
