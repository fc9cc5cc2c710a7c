import numpy as np
import pytest

from duollm.analysis.equal_budget import nll_at

CURVE = {("static", k): np.array([3.0 - 0.1 * k**2, 3.0 - 0.2 * k**2]) for k in (0, 1, 2, 4)}


def test_lies_on_the_line_between_neighbours():
    spent_X = np.array([1.25, 1.5])
    expected = [
        np.interp(spent, [1, 2], [CURVE["static", 1][x], CURVE["static", 2][x]]) for x, spent in enumerate(spent_X)
    ]
    assert nll_at(CURVE, "static", spent_X) == pytest.approx(expected)


def test_a_whole_number_needs_no_neighbour():
    assert nll_at(CURVE, "static", np.array([4.0, 4.0])) == pytest.approx(CURVE["static", 4])


@pytest.mark.parametrize(("policy", "spent"), [("static", 2.5), ("static", 3.5), ("static", 4.5), ("oracle", 1.5)])
def test_is_none_without_both_neighbours(policy, spent):
    assert nll_at(CURVE, policy, np.full(2, spent)) is None
