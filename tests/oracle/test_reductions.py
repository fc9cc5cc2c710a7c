import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from duollm import RouteSpace
from duollm.oracle.budgets import Cells, Exactly
from duollm.oracle.contexts import Batch
from duollm.oracle.reductions import BestSoFar, Entered, LeafTable, Leaves, RandomRoutes
from naive_oracle import tiny_model, tiny_tokens

CELLS = Cells(RouteSpace(2), 1, 4)  # three cells
TOKENS, NEVER = 4, torch.iinfo(torch.long).max
BATCH = Batch(tiny_model(), tiny_tokens(1, TOKENS + 1))

leaf = st.tuples(
    st.integers(0, 2),
    st.integers(0, TOKENS - 1),
    st.integers(0, 50),
    st.sampled_from([0.5, 1.0, 1.5, float("inf")]),  # few values, so that ties abound
)
batches = st.lists(st.lists(leaf, max_size=12, unique_by=lambda each: each[:3]), max_size=4)


def score_of(cell, token, route):
    return float(1000 * cell + 100 * token + route)


def opened(reduction, budgets=()):
    reduction.begin(BATCH, CELLS, budgets, torch.Generator().manual_seed(0))
    reduction.start(torch.arange(TOKENS))
    return reduction


def scoring():
    """A search whose labels, and others that score its picks, are told apart by their embeddings."""
    return opened(BestSoFar(torch.zeros(TOKENS, 2), torch.ones(TOKENS, 2)))


class Given(Entered):
    """Leaves with losses of our choice."""

    def nll(self, label_ND):
        return self.hidden_MD if (label_ND == 1).all() else self.log_z_M


def entered(batch):
    cell, tokens, ids, nll = zip(*batch, strict=True)
    score = torch.tensor([score_of(*each[:3]) for each in batch])
    block = Leaves(torch.arange(TOKENS), *[torch.zeros(1, TOKENS)] * 3)
    none = torch.zeros(len(batch), dtype=torch.long)
    return Given(block, none, torch.tensor(tokens), torch.tensor(ids), torch.tensor(cell), score, torch.tensor(nll))


@given(batches=batches)
def test_the_winner_is_the_lowest_then_the_smallest_route_and_the_score_is_the_winners(batches):
    best = scoring()
    for batch in batches:
        if batch:
            best.update(entered(batch))
    for cell in range(3):
        for token in range(TOKENS):
            seen = [each for batch in batches for each in batch if each[:2] == (cell, token) and each[3] < 9]
            if not seen:
                assert best.nll_QN[cell, token] == torch.inf
                continue
            *_, route, nll = min(seen, key=lambda each: (each[3], each[2]))
            assert best.nll_QN[cell, token] == nll
            assert best.ids_QN[cell, token] == route
            assert best.score_QN[cell, token] == score_of(cell, token, route)


def test_a_later_equal_of_smaller_id_takes_over_and_a_later_equal_of_larger_id_does_not():
    best = scoring()
    for route, expected in ((5, 5), (7, 5), (3, 3)):
        best.update(entered([(0, 0, route, 1.0)]))
        assert best.ids_QN[0, 0] == expected
        assert best.score_QN[0, 0] == score_of(0, 0, expected)


def test_nothing_seen_is_infinitely_bad():
    best = opened(BestSoFar())
    assert (best.nll_QN == torch.inf).all()
    assert (best.ids_QN == NEVER).all()


def test_starting_again_forgets():
    best = scoring()
    best.update(entered([(0, 0, 5, 1.0)]))
    best.start(torch.tensor([2]))
    assert best.nll_QN.tolist() == [[torch.inf]] * 3


@pytest.mark.parametrize("routes", [1, 64])
def test_random_routes_count_where_they_were_drawn(routes):
    drawn = opened(RandomRoutes(routes), [Exactly(1)])
    ids_PN = torch.arange(4)[:, None].expand(4, TOKENS)
    leaves = Leaves(torch.arange(TOKENS), ids_PN, torch.ones_like(ids_PN), torch.zeros(4, TOKENS, 32))
    lower_PN = drawn.lower(leaves, torch.full((4, TOKENS), 3.0))
    counts_PN = lower_PN == 3
    assert lower_PN[~counts_PN].isinf().all()
    assert not counts_PN[[0, 3]].any()  # have no big layer, and two
    assert (counts_PN.sum(0) == min(routes, 2)).all()


def test_a_table_takes_in_its_own_tokens_and_is_nan_elsewhere():
    table = opened(LeafTable(torch.tensor([False, True, False, True]), routes=3))
    for token in range(TOKENS):
        table.update(entered([(0, token, 2, float(token)), (0, token, 0, 10.0 + token)]))
    assert table.counted_M.tolist() == [1, 3]
    assert table.nll_MR[:, [2, 0]].tolist() == [[1.0, 11.0], [3.0, 13.0]]
    assert table.nll_MR[:, 1].isnan().all()
    needed_PN = table.lower(entered([(0, 0, 0, 0.0)]).leaves, torch.zeros(2, TOKENS))
    assert (needed_PN == -torch.inf).tolist() == [[False, True, False, True]] * 2
