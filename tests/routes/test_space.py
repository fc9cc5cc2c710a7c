import json
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


GROUPS = [[4, 5], [0, 2]]  # given in any order; layers 1 and 3 are fixed


class TestGroups:
    space = RouteSpace(6, (SKIP, SMALL, BIG), GROUPS, {3: BIG, 1: SMALL})

    def test_ids_count_the_groups_in_the_order_of_their_first_layers(self):
        naive = [[a, SMALL, a, BIG, b, b] for a, b in product((SKIP, SMALL, BIG), repeat=2)]
        assert self.space.size == 9
        np.testing.assert_array_equal(self.space.decode(np.arange(9)), naive)
        np.testing.assert_array_equal(self.space.encode(np.array(naive)), np.arange(9))
        assert self.space.count_big(np.arange(9)).tolist() == [row.count(BIG) for row in naive]

    def test_budgets_are_in_layers_and_fixed_ones_count(self):
        assert self.space.big_layers == [1, 3, 5]
        assert self.space.ids_with(5).tolist() == [8]
        assert sum(self.space.routes_spending.values()) == 9
        with pytest.raises(ValueError, match=r"2 big layers is impossible here; allowed: 1, 3, 5$"):
            self.space.ids_with(2)

    @pytest.mark.parametrize(
        ("layers", "number", "expected"),
        [(6, 3, ((0, 1), (2, 3), (4, 5))), (5, 2, ((0, 1, 2), (3, 4))), (3, 3, ((0,), (1,), (2,)))],
    )
    def test_a_number_makes_groups_as_equal_as_can_be(self, layers, number, expected):
        assert RouteSpace(layers, groups=number).group_layers == expected

    def test_a_number_divides_the_layers_that_vary(self):
        assert RouteSpace(6, groups=2, fixed={0: BIG, 3: SKIP}).group_layers == ((1, 2), (4, 5))

    def test_layers_alone_are_no_groups(self):
        assert RouteSpace(3, groups=3) == RouteSpace(3, groups=[[2], [0], [1]]) == RouteSpace(3)

    @pytest.mark.parametrize("space", [RouteSpace(4), RouteSpace(30, (SKIP, BIG), 10), space])
    def test_facts_describe_a_space(self, space):
        assert RouteSpace.from_facts(json.loads(json.dumps(space.facts))) == space

    def test_uniform_routes_that_what_is_fixed_forbids_are_not_there(self):
        assert self.space.uniform(BIG) is None
        assert RouteSpace(3, groups=2, fixed={0: BIG}).uniform(BIG) == 3
        assert RouteSpace(4, (SKIP, BIG), 2).uniform(SMALL) is None

    @pytest.mark.parametrize(
        ("groups", "fixed", "fault"),
        [
            ([[0, 1], [2]], {}, "layer 3 is in no group and not fixed"),
            ([[0, 1], [1, 2, 3]], {}, "layer 1 is named more than once"),
            ([[0, 1], [2, 3]], {3: BIG}, "layer 3 is named more than once"),
            ([[0, 1], [2, 3, 4]], {}, r"name layer 4; the layers are 0 \.\. 3"),
            ([[0, 1, 2, 3], []], {}, "every group needs a layer"),
            ([], dict.fromkeys(range(4), BIG), "some layer must vary"),
            (5, {}, "at most the 4 layers that vary and at least 1, got 5"),
            (0, {}, "got 0"),
            (None, {7: BIG}, "name layer 7"),
        ],
        ids=str,
    )
    def test_groups_must_name_every_layer_once(self, groups, fixed, fault):
        with pytest.raises(ValueError, match=fault):
            RouteSpace(4, groups=groups, fixed=fixed)

    @pytest.mark.parametrize(
        ("route", "fault"),
        [
            ([2, 1, 0, 2, 1, 1], "layer 2 must be as its group, got SKIP"),
            ([2, 1, 2, 0, 1, 1], "layer 3 is fixed to BIG, got SKIP"),
        ],
    )
    def test_routes_that_break_a_group_are_refused(self, route, fault):
        with pytest.raises(ValueError, match=fault):
            self.space.encode(np.array(route))
