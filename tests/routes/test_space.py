from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duollm.models.branch import Branch
from duollm.routes.space import RouteSpace, check_big_layers, parse_branches

SKIP, SMALL, BIG = Branch
BRANCH_SETS = [(SMALL, BIG), (SKIP, BIG), (SKIP, SMALL), (SKIP, SMALL, BIG)]


@pytest.mark.parametrize("branches", BRANCH_SETS)
@pytest.mark.parametrize("layers", [1, 2, 5])
def test_ids_count_routes_as_numbers_with_layer_0_first(layers, branches):
    space = RouteSpace(layers, branches)
    naive = np.array(list(product(branches, repeat=layers)))
    assert space.size == len(naive) == len(branches) ** layers
    np.testing.assert_array_equal(space.decode(np.arange(space.size)), naive)
    np.testing.assert_array_equal(space.encode(naive), np.arange(space.size))


def test_the_documented_example():
    space = RouteSpace(12)
    assert space.encode(np.array([BIG] + [SMALL] * 11)) == 2**11
    assert space.encode(np.array([SMALL] * 11 + [BIG])) == 1


@given(data=st.data(), branches=st.sampled_from(BRANCH_SETS), layers=st.integers(1, 39))
def test_encode_undoes_decode_up_to_the_deepest_spaces(data, branches, layers):
    space = RouteSpace(layers, branches)
    ids = np.array(data.draw(st.lists(st.integers(0, space.size - 1), min_size=1, max_size=5)))
    assert space.decode(ids).shape == (len(ids), layers)
    np.testing.assert_array_equal(space.encode(space.decode(ids)), ids)


@pytest.mark.parametrize("branches", BRANCH_SETS)
def test_ids_with_lists_every_route_of_a_budget_once(branches):
    space = RouteSpace(5, branches)
    for big in range(6 if BIG in branches else 1):
        naive = [index for index, route in enumerate(product(branches, repeat=5)) if route.count(BIG) == big]
        assert space.ids_with(big).tolist() == naive


def test_big_layers_are_counted():
    space = RouteSpace(4, (SKIP, SMALL, BIG))
    routes = np.array([[[BIG, SKIP, BIG, SMALL], [SKIP, SKIP, SMALL, SMALL]]])
    assert space.count_big(space.encode(routes)).tolist() == [[2, 0]]


def test_torch_in_torch_out():
    torch = pytest.importorskip("torch")
    space = RouteSpace(3)
    ids = torch.arange(8).view(2, 4)
    routes = space.decode(ids)
    assert routes.dtype == ids.dtype
    assert routes.shape == (2, 4, 3)
    assert torch.equal(space.encode(routes), ids)
    assert torch.equal(space.count_big(ids), (routes == BIG).sum(-1))


@pytest.mark.parametrize("ids", [[-1], [8], [0, 9]])
def test_ids_outside_the_space_are_refused(ids):
    with pytest.raises(ValueError, match=r"0 \.\. 7"):
        RouteSpace(3).decode(np.array(ids))


@pytest.mark.parametrize(
    ("routes", "expected"),
    [([1, 2], "3 layers"), (1, "3 layers"), ([1, 2, 0], "SMALL=1, BIG=2"), ([1, 2, 7], "7"), ([1, 2, -1], "-1")],
)
def test_routes_that_do_not_belong_are_refused(routes, expected):
    with pytest.raises(ValueError, match=expected):
        RouteSpace(3).encode(np.array(routes))


@pytest.mark.parametrize("branches", [(), (BIG,), (BIG, SMALL), (SMALL, SMALL)])
def test_branch_sets_are_ascending_and_hold_a_choice(branches):
    with pytest.raises(ValueError, match="ascending"):
        RouteSpace(3, branches)


def test_sizes_that_do_not_work_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        RouteSpace(0)
    with pytest.raises(ValueError, match="64-bit"):
        RouteSpace(64)
    assert RouteSpace(63).decode(np.array([2**63 - 1])).min() == BIG


@pytest.mark.parametrize(
    ("branches", "big"), [((SMALL, BIG), -1), ((SMALL, BIG), 4), ((SKIP, SMALL), 1), ((SKIP, SMALL, BIG), 4)]
)
def test_impossible_budgets_are_refused(branches, big):
    with pytest.raises(ValueError, match="impossible"):
        check_big_layers(RouteSpace(3, branches), big)


def test_branches_are_parsed_by_name():
    assert parse_branches(["big", "skip"]) == (SKIP, BIG)
