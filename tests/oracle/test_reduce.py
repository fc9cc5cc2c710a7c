import torch
from hypothesis import given
from hypothesis import strategies as st

from duollm.oracle.reduce import Contest, LeafTable

CELLS, TOKENS, NEVER = 3, 4, torch.iinfo(torch.long).max

leaf = st.tuples(
    st.integers(0, CELLS - 1),
    st.integers(0, TOKENS - 1),
    st.integers(0, 50),
    st.sampled_from([0.5, 1.0, 1.5, float("inf")]),  # few values, so that ties abound
)
batches = st.lists(st.lists(leaf, max_size=12, unique_by=lambda each: each[:3]), max_size=4)


def score_of(cell, token, route):
    return float(1000 * cell + 100 * token + route)


def columns(batch):
    cell, tokens, ids, nll = zip(*batch, strict=True)
    score = [score_of(*each[:3]) for each in batch]
    return torch.tensor(cell), torch.tensor(tokens), torch.tensor(ids), torch.tensor(nll), torch.tensor(score)


@given(batches=batches)
def test_the_winner_is_the_lowest_then_the_smallest_route_and_the_score_is_the_winners(batches):
    contest = Contest.open(torch.zeros(TOKENS, 2), CELLS, scored_ND=torch.zeros(TOKENS, 2))
    for batch in batches:
        if batch:
            contest.update(*columns(batch))
    for cell in range(CELLS):
        for token in range(TOKENS):
            entered = [each for batch in batches for each in batch if each[:2] == (cell, token) and each[3] < 9]
            if not entered:
                assert contest.nll_QN[cell, token] == torch.inf
                continue
            *_, route, nll = min(entered, key=lambda each: (each[3], each[2]))
            assert contest.nll_QN[cell, token] == nll
            assert contest.ids_QN[cell, token] == route
            assert contest.score_QN[cell, token] == score_of(cell, token, route)


def test_a_later_equal_of_smaller_id_takes_over_and_a_later_equal_of_larger_id_does_not():
    contest = Contest.open(torch.zeros(1, 2), 1, scored_ND=torch.zeros(1, 2))
    for route, expected in ((5, 5), (7, 5), (3, 3)):
        contest.update(*columns([(0, 0, route, 1.0)]))
        assert contest.ids_QN.tolist() == [[expected]]
        assert contest.score_QN.tolist() == [[score_of(0, 0, expected)]]


def test_nothing_seen_is_infinitely_bad():
    contest = Contest.open(torch.zeros(TOKENS, 2), CELLS)
    assert (contest.nll_QN == torch.inf).all()
    assert (contest.ids_QN == NEVER).all()
    assert contest.score_QN is None


def test_eligible_are_the_routes_drawn_for_that_cell_and_token():
    drawn_QNS = torch.tensor([[[1, 2], [3, 3]], [[4, 5], [6, 1]]])
    contest = Contest.open(torch.zeros(2, 2), 2, drawn_QNS)
    ids_PN = torch.tensor([[1, 1], [3, 3], [4, 1]])
    cell_PN = torch.tensor([[0, 0], [0, 0], [1, 1]])
    assert contest.eligible(ids_PN, cell_PN).tolist() == [[True, False], [False, True], [True, True]]
    assert Contest.open(torch.zeros(2, 2), 2).eligible(ids_PN, cell_PN) is None


def test_a_table_takes_in_its_own_tokens_and_is_nan_elsewhere():
    table = LeafTable.of(torch.tensor([False, True, False, True]), routes=3)
    table.update(torch.tensor([2, 0]), torch.tensor([[0.0, 1.0, 2.0, 3.0], [10.0, 11.0, 12.0, 13.0]]))
    assert table.tokens_M.tolist() == [1, 3]
    assert table.nll_MR[:, [2, 0]].tolist() == [[1.0, 11.0], [3.0, 13.0]]
    assert table.nll_MR[:, 1].isnan().all()
