import pytest
import torch

from duollm import Branch, RouteSpace, search_oracle
from duollm.oracle import approximate
from duollm.oracle.approximate import Beam, Sampled
from duollm.oracle.tree import Tree
from naive_oracle import tiny_model, tiny_tokens


@pytest.mark.parametrize("context", ["shared", "reference"])
def test_rows_per_layer_stay_within_the_width(monkeypatch, context):
    """So time grows linearly with depth, whatever the number of budgets."""
    rows = []

    def recorded(tree, part, depth, attend):
        rows.append((depth, len(part.hidden_PND)))
        return step(tree, part, depth, attend)

    step = Tree.step
    monkeypatch.setattr(Tree, "step", recorded)
    search_oracle(tiny_model(16), tiny_tokens(), RouteSpace(16), context, list(range(17)), method=Beam(width=20))
    per_layer = [sum(count for layer, count in rows if layer == depth) for depth in range(16)]
    assert per_layer == [1, 2, 4, 8, 16] + [20] * 11


@pytest.mark.parametrize("context", ["shared", "reference"])
def test_beats_as_many_random_routes(context):
    model, tokens, space = tiny_model(10), tiny_tokens(), RouteSpace(10)
    exact = search_oracle(model, tokens, space, context, [4]).nll
    beam_excess = (search_oracle(model, tokens, space, context, [4], method=Beam(width=32)).nll - exact).mean()
    random_excess = (search_oracle(model, tokens, space, context, [4], method=Sampled(routes=32)).nll - exact).mean()
    assert 0 <= beam_excess < random_excess / 2


def test_a_token_does_not_read_later_ones_in_the_reference_context():
    model, tokens, space = tiny_model(8), tiny_tokens(), RouteSpace(8)
    later = tokens.clone()
    later[:, 4:] = (later[:, 4:] + 1) % 97
    first, second = (
        search_oracle(model, each, space, "reference", [3], method=Beam(width=8)) for each in (tokens, later)
    )
    assert first.route_ids[..., :3].equal(second.route_ids[..., :3])


def test_padding_has_no_say_in_what_a_sequence_keeps():
    model, tokens, space = tiny_model(8), tiny_tokens(1, 6), RouteSpace(8)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    alone = search_oracle(model, tokens[:, :4], space, "shared", [3], method=Beam(width=8))
    for padding in (0, 50):
        padded = torch.cat([tokens[:, :4], torch.full((1, 2), padding)], dim=1)
        found = search_oracle(model, padded, space, "shared", [3], attention_mask=mask, method=Beam(width=8))
        torch.testing.assert_close(found.nll[..., :3], alone.nll, atol=1e-5, rtol=0)


def test_without_a_big_branch_only_budget_0_is_left():
    model, tokens, space = tiny_model(5), tiny_tokens(), RouteSpace(5, (Branch.SKIP, Branch.SMALL))
    exact = search_oracle(model, tokens, space, "reference", [0])
    found = search_oracle(model, tokens, space, "reference", [0], method="beam")
    assert found.route_ids.equal(exact.route_ids)


@pytest.mark.parametrize(
    ("width", "candidates", "quotas"),
    [
        (12, [4, 4, 4], [4, 4, 4]),
        (10, [1, 20, 20], [1, 4, 5]),
        (10, [20, 1, 2], [7, 1, 2]),
        (2, [5, 5, 5, 5], [1, 1, 1, 1]),
    ],
)
def test_what_one_stratum_cannot_use_others_get(width, candidates, quotas):
    assert approximate._divide(width, candidates) == quotas


def test_a_sequence_keeps_prefixes_that_complement_each_other():
    promise_MU = torch.tensor([[3.0, 3.0, 0.0], [0.0, 1.0, 4.0], [0.0, 0.9, 4.2], [1.0, 1.0, 1.0]])
    chosen = approximate._keep(promise_MU[:, None], 3)
    # The best on average first; then what lowers the sum of minima most: 0 (by 1), then 2 (by 1.1).
    assert chosen[0, 0] == 3
    assert set(chosen[1:, 0].tolist()) == {0, 2}
