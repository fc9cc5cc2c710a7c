import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from duollm import Branch, RouteSpace
from duollm.errors import UserError
from duollm.oracle.budgets import (
    AtMost,
    Cells,
    Exactly,
    FlopsShare,
    OnAverage,
    Schedule,
    parse_budget,
    parse_budgets,
)
from naive_oracle import GROUPED

SKIP, SMALL, BIG = Branch
OPTIONS = [(SMALL, BIG), (SKIP, BIG), (SKIP, SMALL), (SKIP, SMALL, BIG)]
CELLS = Cells(RouteSpace(3), small_cost=1, big_cost=4)
ALL_CELLS = Cells(RouteSpace(3, tuple(Branch)), small_cost=1, big_cost=4)


class TestCells:
    @pytest.mark.parametrize("space", [*(RouteSpace(4, each) for each in OPTIONS), *GROUPED.values()])
    def test_they_are_all_that_routes_spend(self, space):
        routes = space.decode(torch.arange(space.size)).tolist()
        naive = {(route.count(SMALL), route.count(BIG)) for route in routes}
        cells = Cells(space, 1, 4)
        assert set(cells.spent) == naive
        assert len(cells.spent) == len(naive)

    def test_they_go_from_cheap_to_dear_and_fewer_big_layers_come_first(self):
        cells = Cells(RouteSpace(2, tuple(Branch)), small_cost=1, big_cost=2)
        assert cells.spent == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (0, 2)]
        assert [cells.cost(*pair) for pair in cells.spent] == [0, 1, 2, 2, 3, 4]

    @pytest.mark.parametrize("space", [*(RouteSpace(4, each) for each in OPTIONS), *GROUPED.values()])
    def test_they_know_how_many_routes_they_hold_and_which_they_are(self, space):
        cells, routes = Cells(space, 1, 4), space.decode(torch.arange(space.size))
        cell_R = cells.index((routes == SMALL).sum(-1), (routes == BIG).sum(-1))
        assert torch.bincount(cell_R, minlength=len(cells.spent)).tolist() == cells.routes
        spent_R2 = torch.tensor(cells.spent)[cell_R]
        assert spent_R2.equal(torch.stack([(routes == SMALL).sum(-1), (routes == BIG).sum(-1)], dim=1))

    def test_share_is_of_all_big(self):
        assert CELLS.share(0, 3) == 1
        assert CELLS.share(3, 0) == 1 / 4
        assert CELLS.share(1, 2) == 9 / 12


class TestAllows:
    @pytest.mark.parametrize(
        ("budget", "rule"),
        [
            (Exactly(2), lambda small, big: big == 2),
            (AtMost(2), lambda small, big: big <= 2),
            (FlopsShare(0.5), lambda small, big: small + 4 * big <= 6),
            (FlopsShare(9 / 12), lambda small, big: small + 4 * big <= 9),
            (Schedule((3, 1)), lambda small, big: big == 3),
            (OnAverage(1.5), lambda small, big: True),
        ],
        ids=["exactly", "at most", "flops", "flops of 9", "schedule", "average"],
    )
    def test_cells_within_the_budget(self, budget, rule):
        assert budget.allows(ALL_CELLS, 0) == [rule(*pair) for pair in ALL_CELLS.spent]

    def test_a_schedule_goes_by_position_and_its_last_value_holds_on(self):
        allowed_QT = CELLS.allowed(Schedule((2, 0)), range(4))
        assert allowed_QT.T.tolist() == [[big == at for _, big in CELLS.spent] for at in (2, 0, 0, 0)]

    @pytest.mark.parametrize(
        ("budget", "message"),
        [
            (Exactly(4), "a budget of 4 big layers is impossible here; allowed: 0 .. 3"),
            (AtMost(-1), "allowed: 0 .. 3"),
            (Schedule((0, 4)), "a budget of 4"),
            (FlopsShare(0.2), "no route costs at most 0.2 of all big; the cheapest costs 0.2500"),
            (OnAverage(3.5), "an average of 3.5 big layers is impossible here; allowed: 0 .. 3"),
        ],
        ids=str,
    )
    def test_impossible_budgets_are_refused(self, budget, message):
        with pytest.raises(ValueError, match=message):
            CELLS.allowed(budget, range(2))


class TestRamp:
    @pytest.mark.parametrize(
        ("first", "last", "tokens", "expected"),
        [(6, 2, 5, (6, 5, 4, 3, 2)), (0, 3, 4, (0, 1, 2, 3)), (4, 4, 3, (4, 4, 4)), (5, 1, 1, (5,)), (2, 1, 2, (2, 1))],
    )
    def test_steps_are_equal(self, first, last, tokens, expected):
        assert Schedule.ramp(first, last, tokens).big_by_position == expected

    @given(first=st.integers(0, 40), last=st.integers(0, 40), tokens=st.integers(2, 60))
    def test_it_starts_and_ends_as_told_and_never_turns(self, first, last, tokens):
        bigs = Schedule.ramp(first, last, tokens).big_by_position
        assert (bigs[0], bigs[-1], len(bigs)) == (first, last, tokens)
        assert list(bigs) == sorted(bigs, reverse=first > last)


class TestParsing:
    @pytest.mark.parametrize(
        ("text", "budget", "name"),
        [
            ("at-most 4", AtMost(4), "atmost4"),
            ("flops 0.5", FlopsShare(0.5), "flops0.5"),
            ("average 4", OnAverage(4.0), "average4"),
            ("average 2.5", OnAverage(2.5), "average2.5"),
            ("ramp 6 2", Schedule((6, 5, 4, 3, 2)), "ramp6to2"),
        ],
    )
    def test_texts_of_recipes(self, text, budget, name):
        assert parse_budget(text, positions=5) == budget
        assert budget.name == name

    @pytest.mark.parametrize("text", ["", "at-most", "at-most 4 5", "at-most x", "at-most 2.5", "ramp 6", "exactly 4"])
    def test_other_texts_are_refused_in_one_line(self, text):
        with pytest.raises(UserError, match=r"^cannot read budget .*; budgets look like `at-most 4`.*$"):
            parse_budget(text, positions=5)

    def test_default_is_every_number_of_big_layers(self):
        assert parse_budgets(None, None, RouteSpace(2)) == [Exactly(0), Exactly(1), Exactly(2)]
        assert parse_budgets(None, None, RouteSpace(2, (SKIP, SMALL))) == [Exactly(0)]
        assert parse_budgets([2, 0], None, RouteSpace(2)) == [Exactly(2), Exactly(0)]
