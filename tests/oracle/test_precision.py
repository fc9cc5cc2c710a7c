"""The search in other number formats: a model in half precision, and any model under autocast."""

from contextlib import nullcontext

import pytest
import torch

from duollm import Branch, RouteSpace, loss_table, search_oracle
from duollm.oracle.contexts import CONTEXTS
from duollm.oracle.noise import DrawnLabels
from duollm.oracle.reductions import RandomRoutes
from duollm.oracle.search import executed_nll
from naive_oracle import naive_committed, naive_table, tiny_model, tiny_tokens

SPACE = RouteSpace(num_layers=3)
ROUNDING = {torch.bfloat16: 0.15, torch.float16: 0.015}  # nats; versions of torch round differently
FORMATS = {
    "autocast to bf16": (torch.float32, torch.bfloat16),
    "autocast to fp16": (torch.float32, torch.float16),
    "bf16": (torch.bfloat16, None),
    "fp16": (torch.float16, None),
}


@pytest.fixture(params=FORMATS.values(), ids=FORMATS)
def half(request):
    """A model, the context to run it in, and how far its losses may be rounded."""
    weights, autocast = request.param
    context = torch.autocast("cpu", autocast) if autocast else nullcontext()
    return tiny_model(key_value_heads=1).to(weights), context, ROUNDING[autocast or weights]


@pytest.mark.parametrize("context", ["shared", "reference"])
def test_losses_are_those_of_single_passes(half, closer_bound, context):
    model, autocast, rounding = half
    ids = tiny_tokens()
    with autocast:
        naive_BTR = naive_table(model, ids, SPACE, context).float()
        table_BTR = loss_table(model, ids, SPACE, context)
        kept = [DrawnLabels(), RandomRoutes(3)]
        found = search_oracle(model, ids, SPACE, context, reductions=kept)
        whole = search_oracle(model, ids, SPACE, context, reductions=kept, prune=False)
    assert table_BTR.dtype == found.nll.dtype == torch.float32
    torch.testing.assert_close(table_BTR, naive_BTR, atol=rounding, rtol=0)
    torch.testing.assert_close(found.nll.amin(0), naive_BTR.amin(-1), atol=rounding, rtol=0)
    assert found.route_ids.equal(whole.route_ids)
    assert found.nll.equal(whole.nll)


def test_committed_picks_are_what_one_pass_gives(half):
    model, autocast, rounding = half
    ids = tiny_tokens()
    with autocast:
        found = search_oracle(model, ids, SPACE, "committed", big_layers=[2])
        naive_BT, _ = naive_committed(model, ids, SPACE, [torch.as_tensor(SPACE.ids_with(big=2))] * 5)
        executed_BT = executed_nll(model, ids, SPACE, found.route_ids[0])
    torch.testing.assert_close(found.nll[0], naive_BT, atol=rounding, rtol=0)
    torch.testing.assert_close(found.nll[0], executed_BT, atol=rounding, rtol=0)


@pytest.mark.parametrize("method", ["beam", "local"])
def test_approximate_searches_find_losses_of_the_table(half, method):
    model, autocast, rounding = half
    ids = tiny_tokens()
    with autocast:
        table_BTR = loss_table(model, ids, SPACE, "reference")
        found = search_oracle(model, ids, SPACE, "reference", big_layers=[1], method=method)
    expected_BT = table_BTR.gather(-1, found.route_ids[0, ..., None])[..., 0]
    torch.testing.assert_close(found.nll[0], expected_BT, atol=rounding, rtol=0)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_the_bound_spares_no_leaf_that_rounding_lets_win(scale):
    model = tiny_model().to(torch.bfloat16)
    model.lm_head.weight.data *= scale  # large logits are rounded by whole nats
    pruned, whole = (search_oracle(model, tiny_tokens(4, 8), SPACE, "shared", prune=prune) for prune in (True, False))
    assert pruned.nll.equal(whole.nll)
    assert pruned.route_ids.equal(whole.route_ids)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("scope", ["ffn", "layer"])
def test_every_branch_and_scope_under_autocast(context, scope):
    model, ids = tiny_model(3, scope), tiny_tokens()
    space = RouteSpace(3, tuple(Branch))
    exact = search_oracle(model, ids, space, context, [1])
    with torch.autocast("cpu", torch.bfloat16):
        found = search_oracle(model, ids, space, context, [1])
        beam = search_oracle(model, ids, space, context, [1], method="beam")
    torch.testing.assert_close(found.nll.mean(), exact.nll.mean(), atol=0.1, rtol=0)
    assert beam.nll.isfinite().all()
