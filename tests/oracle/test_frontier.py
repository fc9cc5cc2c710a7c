from itertools import pairwise, product

import torch
from hypothesis import given
from hypothesis import strategies as st

from duollm import Branch, RouteSpace
from duollm.oracle.budgets import AtMost, Cells, Exactly, FlopsShare, Frontier, OnAverage, Schedule

SKIP, SMALL, BIG = Branch
CELLS = Cells(RouteSpace(3), small_cost=1, big_cost=4)
ALL_CELLS = Cells(RouteSpace(3, tuple(Branch)), small_cost=1, big_cost=4)


@st.composite
def frontiers(draw, cells=CELLS, tokens=4):
    """Best losses [Q, 1, T]: whole tenths, so that ties occur."""
    size = len(cells.spent) * tokens
    tenths = draw(st.lists(st.integers(0, 40), min_size=size, max_size=size))
    return torch.tensor(tenths).view(len(cells.spent), 1, tokens) / 10


def pick(budget, cells, nll_QBT, wanted_QBT, first_position=0, padding_BT=None):
    if padding_BT is None:
        padding_BT = torch.zeros_like(nll_QBT[0], dtype=torch.bool)
    frontier = Frontier([budget], cells, padding_BT, first_position)
    return frontier.read(nll_QBT.flatten(1), wanted_QBT.flatten(1))[0]


def best(budget, nll_QBT, cells=CELLS, **options):
    return pick(budget, cells, nll_QBT, nll_QBT, **options)


def spent(budget, nll_QBT, cells=CELLS, **options):
    big_Q = torch.tensor([big for _, big in cells.spent])
    return pick(budget, cells, nll_QBT, big_Q[:, None, None].expand_as(nll_QBT), **options)


class TestPick:
    @given(nll_QBT=frontiers(ALL_CELLS))
    def test_the_best_allowed_cell_and_the_cheapest_of_equals(self, nll_QBT):
        index_QBT = torch.arange(len(nll_QBT))[:, None, None].expand_as(nll_QBT)
        for budget in (Exactly(1), AtMost(2), FlopsShare(0.6), Schedule((3, 2, 0, 1))):
            picked = pick(budget, ALL_CELLS, nll_QBT, index_QBT)[0].tolist()
            for token, cell in enumerate(picked):
                allowed = [q for q, yes in enumerate(budget.allows(ALL_CELLS, token)) if yes]
                assert cell == min(allowed, key=lambda q: (nll_QBT[q, 0, token].item(), q))

    def test_positions_may_start_later(self):
        nll_QBT = torch.rand(4, 1, 3, generator=torch.Generator().manual_seed(0))
        schedule = Schedule((0, 1, 2, 3))
        assert spent(schedule, nll_QBT, first_position=1).tolist() == [[1, 2, 3]]

    @given(nll_QBT=frontiers(ALL_CELLS))
    def test_a_wider_budget_is_never_worse(self, nll_QBT):
        at_most = [best(AtMost(big), nll_QBT, ALL_CELLS) for big in range(4)]
        flops = [best(FlopsShare(share), nll_QBT, ALL_CELLS) for share in (0, 0.1, 0.25, 0.5, 0.75, 1)]
        for ladder in (at_most, flops):
            for narrow, wide in pairwise(ladder):
                assert (wide <= narrow).all()
        for big in range(4):
            assert (at_most[big] <= best(Exactly(big), nll_QBT, ALL_CELLS)).all()


class TestOnAverage:
    @given(nll_QBT=frontiers(), mean=st.sampled_from([0, 0.5, 1, 1.25, 2, 3]))
    def test_against_all_ways_to_split(self, nll_QBT, mean):
        tokens = nll_QBT.shape[-1]
        ways = torch.tensor([*product(range(4), repeat=tokens)])
        total = nll_QBT[:, 0][ways, torch.arange(tokens)].sum(-1)
        within = ways.sum(-1) <= mean * tokens
        found = best(OnAverage(mean), nll_QBT).sum()
        assert spent(OnAverage(mean), nll_QBT).sum() <= mean * tokens
        assert found >= total[within].min() - 1e-5
        # The Lagrangian misses what one token's step of the frontier is worth.
        step = (nll_QBT.amax(0) - nll_QBT.amin(0)).max()
        assert found <= total[within].min() + step + 1e-5

    @given(nll_QBT=frontiers(), big=st.integers(0, 3))
    def test_never_worse_than_the_same_for_every_token(self, nll_QBT, big):
        assert best(OnAverage(big), nll_QBT).mean() <= best(Exactly(big), nll_QBT).mean() + 1e-5

    def test_padding_neither_spends_nor_counts(self):
        nll_QBT = torch.tensor([[3.0, 3.0, 9.0], [1.0, 2.0, 1.0], [1.0, 2.0, 0.0], [1.0, 2.0, 0.0]])[:, None]
        padding = torch.tensor([[False, False, True]])
        assert spent(OnAverage(0.5), nll_QBT, padding_BT=padding)[0, :2].tolist() == [1, 0]
