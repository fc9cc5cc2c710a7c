import pytest

from duollm.routes.sampling import pattern, spread_layers


@pytest.mark.parametrize(("big", "layers"), [(0, []), (1, [6]), (4, [1, 4, 7, 10]), (12, list(range(12)))])
def test_big_layers_are_spread_evenly(big, layers):
    assert spread_layers(big, 12) == layers


def test_a_pattern_is_big_where_it_says():
    assert pattern([0, 2], 4).tolist() == [2, 1, 2, 1]
    assert pattern([], 3).tolist() == [1, 1, 1]
