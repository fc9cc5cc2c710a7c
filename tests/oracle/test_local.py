import pytest
import torch

from duollm import Branch, RouteSpace, search_oracle
from duollm.oracle.approximate import Local, Sampled, moves
from duollm.oracle.budgets import AtMost, Cells, Exactly
from naive_oracle import naive_table, tiny_model, tiny_tokens

SKIP, SMALL, BIG = Branch


def naive_neighbours(route_id, limit, space):
    """One group changed, or two exchanged, within the budget."""
    route = space.decode(torch.tensor(route_id))
    found = set()
    for one in map(list, space.group_layers):
        for branch in space.branches:
            changed = route.clone()
            changed[one] = branch
            found.add(tuple(changed.tolist()))
        for two in map(list, space.group_layers):
            changed = route.clone()
            changed[one], changed[two] = route[two[0]], route[one[0]]
            found.add(tuple(changed.tolist()))
    found.discard(tuple(route.tolist()))

    def allowed(big):
        return big == limit.big if isinstance(limit, Exactly) else big <= limit.big

    return {int(space.encode(torch.tensor(each))) for each in found if allowed(each.count(int(BIG)))}


@pytest.mark.parametrize("branches", [(SMALL, BIG), (SKIP, BIG), (SKIP, SMALL, BIG)])
@pytest.mark.parametrize("layers", [(4,), (7, [[0, 2], [1], [3], [5, 6]], {4: BIG})], ids=["layers", "groups"])
@pytest.mark.parametrize("limit", [Exactly(3), AtMost(3)])
def test_moves_are_all_changes_and_exchanges_within_the_budget(branches, layers, limit):
    space = RouteSpace(layers[0], branches, *layers[1:])
    bigs = [3] if isinstance(limit, Exactly) else [big for big in space.big_layers if big <= 3]
    ids = torch.cat([torch.as_tensor(space.ids_with(big)) for big in bigs])
    reached = (ids + moves(ids, limit, Cells(space, 1, 4))).T
    for route_id, neighbours in zip(ids.tolist(), reached.tolist(), strict=True):
        assert set(neighbours) - {route_id} == naive_neighbours(route_id, limit, space)


@pytest.mark.parametrize("context", ["shared", "reference"])
@pytest.mark.parametrize("limit", [Exactly(2), AtMost(2)])
def test_no_move_betters_the_result(context, limit):
    model, tokens, space = tiny_model(5), tiny_tokens(), RouteSpace(5)
    truth = naive_table(model, tokens, space, context)
    found = search_oracle(model, tokens, space, context, budgets=[limit], method=Local(torch.tensor(0b00011)))
    tokens = zip(found.route_ids[0].flatten().tolist(), found.nll[0].flatten(), truth.flatten(0, 1), strict=True)
    for route_id, nll, truth_R in tokens:
        assert nll <= truth_R[list(naive_neighbours(route_id, limit, space))].min() + 1e-4


@pytest.mark.parametrize("context", ["shared", "reference"])
def test_betters_its_start(context):
    model, tokens, space = tiny_model(10), tiny_tokens(), RouteSpace(10)
    start = search_oracle(model, tokens, space, context, [3, 5], method=Sampled(routes=4))
    still = search_oracle(model, tokens, space, context, [3, 5], method=Local(start.route_ids, steps=0))
    found = search_oracle(model, tokens, space, context, [3, 5], method=Local(start.route_ids))
    assert (still.nll <= start.nll + 1e-5).all()
    assert (found.nll <= still.nll + 1e-5).all()
    assert found.nll.mean() < still.nll.mean() - 0.01


def test_a_committed_start_is_a_hint_that_need_not_survive():
    model, tokens, space = tiny_model(6), tiny_tokens(), RouteSpace(6)
    start = torch.as_tensor(space.ids_with(2))[:5].expand(2, 5)
    found = search_oracle(model, tokens, space, "committed", [2], method=Local(start))
    assert (space.count_big(found.route_ids) == 2).all()


def test_a_result_with_padding_is_a_start():
    model, tokens, space = tiny_model(5), tiny_tokens(), RouteSpace(5)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    start = search_oracle(model, tokens, space, "reference", [2], attention_mask=mask, method=Sampled(routes=2))
    found = search_oracle(model, tokens, space, "reference", [2], attention_mask=mask, method=Local(start.route_ids))
    counted = ~start.nll.isnan()
    assert (found.nll <= start.nll + 1e-5)[counted].all()
    assert found.nll.isnan().equal(start.nll.isnan())
