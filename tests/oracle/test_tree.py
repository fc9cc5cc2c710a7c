import pytest
import torch

from duollm import Branch, RouteSpace
from duollm.oracle.budgets import Cells
from duollm.oracle.contexts import Batch
from duollm.oracle.tree import Rows, Tree
from naive_oracle import tiny_model, tiny_tokens

SKIP, SMALL, BIG = Branch
LAYERS, TOKENS = 4, 5
OPTIONS = [(SMALL, BIG), (SKIP, BIG), (SKIP, SMALL, BIG)]
every_space = pytest.mark.parametrize("branches", OPTIONS)


class Walk:
    """All leaves of a tree, and every block that was on the way."""

    def __init__(self, branches, wanted=None, max_rows=10_000, scope="ffn"):
        self.model, self.space = tiny_model(LAYERS, scope), RouteSpace(LAYERS, branches)
        cells = Cells(self.space, 1, 4)
        wanted_Q = torch.tensor([wanted is None or pair in wanted for pair in cells.spent])
        tree = Tree(self.model.model, cells, wanted_Q, Rows(max_rows, 4 * max_rows))
        batch = Batch(self.model, tiny_tokens(1, TOKENS + 1))
        self.rows_attended = []
        context = batch.shared_context()

        def attend(layer, states_PND):
            self.rows_attended.append((layer.layer_idx, states_PND.shape[0]))
            return context(layer, states_PND)

        with torch.inference_mode():
            self.blocks = list(tree.leaves(batch.hidden_BTD.flatten(0, 1), attend))

        ids = torch.cat([block.ids_PG[:, 0] for block in self.blocks])
        self.ids, order = ids.sort()
        self.spent, self.hidden = (
            torch.cat([getattr(block, name) for block in self.blocks])[order] for name in ("spent_PG2", "hidden_PND")
        )

    def attended(self, depth):
        return sum(prefixes for layer, prefixes in self.rows_attended if layer == depth)


@every_space
@pytest.mark.parametrize("max_rows", [1, 3 * TOKENS, 10_000])
def test_leaves_are_all_routes_once_with_what_they_spend(branches, max_rows):
    walk = Walk(branches, max_rows=max_rows)
    assert walk.ids.tolist() == list(range(walk.space.size))
    routes = walk.space.decode(walk.ids)
    assert walk.spent[:, 0].equal(torch.stack([(routes == branch).sum(-1) for branch in (SMALL, BIG)], dim=1))


@every_space
@pytest.mark.parametrize("scope", ["ffn", "layer"])
@torch.inference_mode()
def test_hidden_states_are_those_of_one_pass_per_route(branches, scope):
    walk = Walk(branches, max_rows=4 * TOKENS, scope=scope)
    tokens = tiny_tokens(1, TOKENS + 1)
    for route in (0, 5, walk.space.size - 1):
        output = walk.model(tokens, routes=walk.space.decode(torch.tensor(route)))
        logits = walk.model.lm_head(walk.model.model.norm(walk.hidden[route]))
        torch.testing.assert_close(logits, output.logits[0, :-1], atol=1e-4, rtol=1e-4)


@every_space
def test_every_prefix_is_computed_once(branches):
    walk = Walk(branches, max_rows=2 * TOKENS)
    assert [walk.attended(depth) for depth in range(LAYERS)] == [len(branches) ** depth for depth in range(LAYERS)]


@pytest.mark.parametrize(
    ("branches", "wanted"),
    [
        ((SMALL, BIG), [(3, 1)]),
        ((SMALL, BIG), [(4, 0), (0, 4)]),
        ((SKIP, BIG), [(0, 1), (0, 3)]),
        ((SKIP, SMALL, BIG), [(0, 0), (1, 1)]),
        ((SKIP, SMALL, BIG), [(2, 2)]),
    ],
    ids=str,
)
def test_only_prefixes_of_wanted_cells_are_walked(branches, wanted):
    walk = Walk(branches, wanted)
    routes = walk.space.decode(torch.arange(walk.space.size)).tolist()
    right = [route for route in routes if (route.count(SMALL), route.count(BIG)) in wanted]
    assert walk.space.decode(walk.ids).tolist() == right
    for depth in range(LAYERS):
        assert walk.attended(depth) == len({tuple(route[:depth]) for route in right})


@every_space
@pytest.mark.parametrize("prefixes", [1, 2, 3, 7])
def test_no_block_is_expanded_with_more_rows_than_allowed(branches, prefixes):
    walk = Walk(branches, max_rows=prefixes * TOKENS + 1)
    most = max(rows for _, rows in walk.rows_attended)
    assert min(prefixes, len(branches) ** (LAYERS - 1)) / len(branches) < most <= prefixes


def test_a_single_prefix_is_expanded_even_if_it_has_more_rows():
    walk = Walk((SMALL, BIG), max_rows=TOKENS - 1)
    assert {rows for _, rows in walk.rows_attended} == {1}
    assert walk.ids.tolist() == list(range(16))


@pytest.mark.parametrize("scope", ["ffn", "layer"])
@pytest.mark.parametrize("groups", [None, [[0, 1], [2]], [[0, 2], [1]]], ids=str)
@pytest.mark.parametrize("context", ["shared", "reference"])
@torch.inference_mode()
def test_no_walk_asks_the_device_for_anything(context, groups, scope):
    """On the meta device there is nothing to be had: whoever asked for a number would fail."""
    fixed = {} if groups is None else {3: BIG}
    space = RouteSpace(LAYERS, tuple(Branch), groups, fixed)
    model = tiny_model(LAYERS, scope)
    cells = Cells(space, 1, 4)
    tree = Tree(model.model, cells, torch.tensor([big == 2 for _, big in cells.spent]), Rows(3 * TOKENS, 7 * TOKENS))
    found = {}
    for device in ("cpu", "meta"):
        model.to(device)
        batch = Batch(model, tiny_tokens(1, TOKENS + 1).to(device))
        attend = batch.shared_context() if context == "shared" else batch.reference_context(None)
        blocks = list(tree.leaves(batch.hidden_BTD.flatten(0, 1), attend))
        assert all(block.hidden_PND.device.type == device for block in blocks)
        assert all(block.hidden_PND.shape == (len(block.ids_PG), *batch.hidden_BTD.shape[1:]) for block in blocks)
        found[device] = torch.cat([torch.cat([block.ids_PG, block.spent_PG2[:, 0]], dim=1) for block in blocks])
    assert found["meta"].equal(found["cpu"])
    assert len(found["cpu"]) == len(space.ids_with(2))
