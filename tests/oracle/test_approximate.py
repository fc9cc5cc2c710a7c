"""What all approximate searches promise, in every context."""

from functools import partial

import pytest
import torch

from duollm import Branch, RouteSpace, search_oracle
from duollm.oracle.approximate import draw_within
from duollm.oracle.beam import beam_search
from duollm.oracle.budgets import AtMost, Exactly, FlopsShare, OnAverage, Schedule
from duollm.oracle.local import local_search
from duollm.oracle.sampled import sampled_search
from duollm.oracle.search import executed_nll
from naive_oracle import forward_nll, naive_table, tiny_model, tiny_tokens

SKIP, SMALL, BIG = Branch
KINDS = [
    pytest.param((SMALL, BIG), "ffn", 2, id="small-big ffn kv2"),
    pytest.param((SKIP, BIG), "layer", 1, id="skip-big layer kv1"),
    pytest.param((SKIP, SMALL, BIG), "layer", 2, id="all layer kv2"),
    pytest.param((SKIP, SMALL, BIG), "ffn", 1, id="all ffn kv1"),
]
LIMITS = [Exactly(1), AtMost(2)]
every_search = pytest.mark.parametrize(
    "search",
    [
        pytest.param(partial(beam_search, width=3), id="beam"),
        pytest.param(partial(local_search, steps=1, width=3), id="local"),
        pytest.param(partial(sampled_search, routes=3), id="sampled"),
    ],
)
every_context = pytest.mark.parametrize("context", ["shared", "reference", "committed"])


def assert_within(route_ids, space, limits):
    for limit, ids in zip(limits, route_ids, strict=True):
        big = space.count_big(ids[ids >= 0])
        assert (big <= limit.big).all() if isinstance(limit, AtMost) else (big == limit.big).all()


def tiny_padding(side):
    ones, zeros = torch.ones(2, 4, dtype=torch.long), torch.zeros(2, 2, dtype=torch.long)
    return torch.cat([zeros, ones] if side == "left" else [ones, zeros], dim=1)


@every_search
@pytest.mark.parametrize(("branches", "scope", "heads"), KINDS)
@pytest.mark.parametrize("context", ["shared", "reference"])
def test_losses_are_those_of_the_routes_returned(search, branches, scope, heads, context):
    model, tokens, space = tiny_model(3, scope, heads), tiny_tokens(), RouteSpace(3, branches)
    truth = naive_table(model, tokens, space, context)
    found = search(model, tokens, space, context, budgets=LIMITS)
    assert_within(found.route_ids, space, LIMITS)
    for nll, ids in zip(found.nll, found.route_ids, strict=True):
        torch.testing.assert_close(truth.gather(-1, ids[..., None])[..., 0], nll, atol=1e-4, rtol=0)


@every_search
@pytest.mark.parametrize(("branches", "scope", "heads"), KINDS)
def test_committed_losses_are_those_of_one_forward_with_the_picks(search, branches, scope, heads):
    model, tokens, space = tiny_model(3, scope, heads), tiny_tokens(), RouteSpace(3, branches)
    found = search(model, tokens, space, "committed", budgets=LIMITS)
    assert_within(found.route_ids, space, LIMITS)
    for nll, ids in zip(found.nll, found.route_ids, strict=True):
        torch.testing.assert_close(executed_nll(model, tokens, space, ids), nll, atol=1e-4, rtol=0)


@every_context
@pytest.mark.parametrize("branches", [(SMALL, BIG), (SKIP, SMALL, BIG)])
@pytest.mark.parametrize(
    "search",
    [
        pytest.param(partial(beam_search, width=1000), id="beam"),
        pytest.param(partial(sampled_search, routes=1000), id="sampled"),
    ],
)
def test_a_search_that_tries_all_routes_is_exact(search, context, branches):
    model, tokens, space = tiny_model(3), tiny_tokens(), RouteSpace(3, branches)
    exact = search_oracle(model, tokens, space, context, budgets=LIMITS)
    found = search(model, tokens, space, context, budgets=LIMITS)
    torch.testing.assert_close(found.nll, exact.nll, atol=1e-5, rtol=0)
    assert found.route_ids.equal(exact.route_ids)


@every_search
@every_context
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_out_and_spoils_nothing(search, context, side):
    model, tokens, space, mask = tiny_model(), tiny_tokens(), RouteSpace(3), tiny_padding(side)
    found = search(model, tokens, space, context, budgets=LIMITS, attention_mask=mask)
    padded = ~(mask[:, :-1] & mask[:, 1:]).bool()
    assert found.nll[:, padded].isnan().all()
    assert (found.route_ids[:, padded] == -1).all()
    assert_within(found.route_ids, space, LIMITS)
    if context != "committed":
        truth = naive_table(model, tokens, space, context, mask=mask)
        picked = truth.expand(2, -1, -1, -1).gather(-1, found.route_ids.clamp(min=0)[..., None])[..., 0]
        torch.testing.assert_close(picked[:, ~padded], found.nll[:, ~padded], atol=1e-4, rtol=0)


@every_search
@every_context
def test_memory_changes_nothing(search, context):
    model, tokens, space = tiny_model(4), tiny_tokens(), RouteSpace(4)
    wide, deep = (search(model, tokens, space, context, [1, 2], memory_bytes=size) for size in (2**30, 1))
    torch.testing.assert_close(wide.nll, deep.nll, atol=1e-5, rtol=0)
    assert wide.route_ids.equal(deep.route_ids)


@every_search
def test_reference_may_be_any_routes(search):
    model, tokens, space = tiny_model(), tiny_tokens(), RouteSpace(3)
    reference = torch.randint(0, 3, (2, 6, 3), generator=torch.Generator().manual_seed(3))
    truth = naive_table(model, tokens, space, "reference", reference)
    found = search(model, tokens, space, "reference", [1], reference=reference)
    picked = truth.gather(-1, found.route_ids[0, ..., None])[..., 0]
    torch.testing.assert_close(picked, found.nll[0], atol=1e-4, rtol=0)


@every_search
@every_context
@pytest.mark.parametrize("branches", [(SMALL, BIG), (SKIP, SMALL, BIG)])
def test_thirty_layers(search, context, branches):
    model, tokens, space = tiny_model(30), tiny_tokens(1, 4), RouteSpace(30, branches)
    found = search(model, tokens, space, context, [10])
    assert_within(found.route_ids, space, [Exactly(10)])
    if context == "shared":
        for position, route in enumerate(space.decode(found.route_ids[0, 0])):
            nll = forward_nll(model, tokens, route)[0, position]
            torch.testing.assert_close(nll, found.nll[0, 0, position], atol=1e-4, rtol=0)
    if context == "committed":
        executed = executed_nll(model, tokens, space, found.route_ids[0])
        torch.testing.assert_close(executed, found.nll[0], atol=1e-4, rtol=0)


@every_search
def test_ties_go_to_the_cheaper_route(search):
    model, tokens, space = tiny_model(), tiny_tokens(), RouteSpace(3)
    for layer in model.model.layers:
        for ffn in (layer.mlp.small, layer.mlp.big):
            torch.nn.init.zeros_(ffn.down_proj.weight)
    found = search(model, tokens, space, budgets=[AtMost(2), Exactly(0)])
    assert (found.route_ids == 0).all()


@every_search
@every_context
def test_the_same_seed_finds_the_same(search, context):
    model, tokens, space = tiny_model(6), tiny_tokens(), RouteSpace(6)
    first, again = (
        search(model, tokens, space, context, [2], generator=torch.Generator().manual_seed(4)) for _ in range(2)
    )
    assert first.route_ids.equal(again.route_ids)


@every_search
@pytest.mark.parametrize("budget", [FlopsShare(0.5), Schedule((1,)), OnAverage(1)])
def test_other_budgets_are_refused(search, budget):
    with pytest.raises(ValueError, match="take budgets Exactly and AtMost, got"):
        search(tiny_model(), tiny_tokens(), RouteSpace(3), budgets=[budget])


@every_search
def test_a_reference_outside_its_context_is_refused(search):
    with pytest.raises(ValueError, match="reference goes with context 'reference', got context 'shared'"):
        search(tiny_model(), tiny_tokens(), RouteSpace(3), "shared", [1], reference=torch.tensor([2, 2, 2]))


@pytest.mark.parametrize(
    ("search", "message"),
    [
        (partial(beam_search, width=0), "width must be at least 1, got 0"),
        (partial(sampled_search, routes=0), "routes must be at least 1, got 0"),
        (partial(local_search, width=0), "width must be at least 1, got 0"),
        (partial(local_search, steps=-1), "steps must be at least 0, got -1"),
        (partial(local_search, start=torch.zeros(3, 3).long()), r"start must broadcast to shape \[1, 2, 5\]"),
        (
            partial(local_search, start=torch.tensor(7)),
            r"start has routes with 3 .. 3 big layers, the budget is Exactly",
        ),
        (partial(local_search, start=torch.tensor(8)), "route ids must be in 0 .. 7"),
    ],
)
def test_impossible_options_are_refused(search, message):
    with pytest.raises(ValueError, match=message):
        search(tiny_model(), tiny_tokens(), RouteSpace(3), "reference", [1])


@pytest.mark.parametrize("branches", [(SMALL, BIG), (SKIP, SMALL, BIG)])
@pytest.mark.parametrize("limit", [Exactly(1), AtMost(1)])
def test_draws_are_uniform_within_the_budget(branches, limit):
    space = RouteSpace(3, branches)
    drawn = draw_within(limit, space, (100, 200), torch.Generator().manual_seed(0))
    bigs = [1] if isinstance(limit, Exactly) else [0, 1]
    allowed = sorted(int(each) for big in bigs for each in space.ids_with(big))
    ids, counts = drawn.unique(return_counts=True)
    assert ids.tolist() == allowed
    assert ((counts / 20000 - 1 / len(allowed)).abs() < 0.015).all()
