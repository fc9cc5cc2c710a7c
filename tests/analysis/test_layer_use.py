import numpy as np
import pytest

from duollm.analysis.layer_use import count_layer_use, pool_layer_use, position_edges
from duollm.analysis.statistics import Bootstrap
from duollm.models.branch import Branch
from duollm.routes.space import RouteSpace

SPACE = RouteSpace(3, (Branch.SKIP, Branch.SMALL, Branch.BIG))


@pytest.fixture(scope="module")
def routed():
    generator = np.random.default_rng(0)
    document_T = np.repeat(np.arange(4), 10)
    position_T = np.tile(np.arange(1, 11), 4)
    return generator.integers(0, SPACE.size, 40), document_T, position_T


def test_shares_equal_a_plain_loop(routed):
    route_T, document_T, position_T = routed
    edges = np.array([1, 4, 11])
    use = count_layer_use(SPACE, route_T, document_T, position_T, edges)
    big_TL = SPACE.decode(route_T) == Branch.BIG
    bootstrap = Bootstrap([4], 5, 0)
    np.testing.assert_allclose(use.by_layer(bootstrap)[0], big_TL.mean(0))
    for p, inside_T in enumerate([position_T < 4, position_T >= 4]):
        np.testing.assert_allclose(use.by_layer_and_position()[:, p], big_TL[inside_T].mean(0))
        np.testing.assert_allclose(use.by_position(bootstrap)[0, p], big_TL[inside_T].mean())


def test_edges_cover_every_position_once():
    edges = position_edges(np.arange(1, 128))
    assert len(edges) == 9
    assert (edges[0], edges[-1]) == (1, 128)
    assert np.diff(edges).min() >= 15


def test_short_windows_have_a_bin_per_position():
    assert position_edges(np.array([1, 2, 3, 1])).tolist() == [1, 2, 3, 4]


def test_pooling_adds_the_counts(routed):
    use = count_layer_use(SPACE, *routed, np.array([1, 11]))
    both = pool_layer_use([use, use])
    assert both.big_DPL.shape == (8, 1, 3)
    np.testing.assert_allclose(both.by_layer(Bootstrap([8], 1, 0))[0], use.by_layer(Bootstrap([4], 1, 0))[0])
