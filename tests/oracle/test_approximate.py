"""What all approximate searches promise, in every context."""

import pytest
import torch

from duollm import Branch, RouteSpace, search_oracle
from duollm.oracle.approximate import Beam, Local, Sampled, draw_within
from duollm.oracle.budgets import AtMost, Cells, Exactly, FlopsShare, OnAverage, Schedule
from duollm.oracle.noise import DrawnLabels
from duollm.oracle.search import executed_nll
from naive_oracle import GROUPED, forward_nll, naive_table, tiny_model, tiny_tokens

SKIP, SMALL, BIG = Branch
SCOPES = ("ffn", "layer")
KINDS = [
    pytest.param(RouteSpace(3, (SMALL, BIG)), "ffn", 2, id="small-big ffn kv2"),
    pytest.param(RouteSpace(3, (SKIP, BIG)), "layer", 1, id="skip-big layer kv1"),
    pytest.param(RouteSpace(3, (SKIP, SMALL, BIG)), "layer", 2, id="all layer kv2"),
    pytest.param(RouteSpace(3, (SKIP, SMALL, BIG)), "ffn", 1, id="all ffn kv1"),
    *(pytest.param(space, scope, 2, id=f"{name} {scope}") for name, space in GROUPED.items() for scope in SCOPES),
]
LIMITS = [Exactly(1), AtMost(2)]
every_method = pytest.mark.parametrize(
    "method",
    [
        pytest.param(Beam(width=3), id="beam"),
        pytest.param(Local(steps=1, width=3), id="local"),
        pytest.param(Sampled(routes=3), id="sampled"),
    ],
)
every_context = pytest.mark.parametrize("context", ["shared", "reference", "committed"])


def limits_in(space):
    return [Exactly(space.big_layers[1]), AtMost(space.big_layers[2])]


def assert_within(route_ids, space, limits):
    for limit, ids in zip(limits, route_ids, strict=True):
        big = space.count_big(ids[ids >= 0])
        assert (big <= limit.big).all() if isinstance(limit, AtMost) else (big == limit.big).all()


def tiny_padding(side):
    ones, zeros = torch.ones(2, 4, dtype=torch.long), torch.zeros(2, 2, dtype=torch.long)
    return torch.cat([zeros, ones] if side == "left" else [ones, zeros], dim=1)


@every_method
@pytest.mark.parametrize(("space", "scope", "heads"), KINDS)
@pytest.mark.parametrize("context", ["shared", "reference"])
def test_losses_are_those_of_the_routes_returned(method, space, scope, heads, context):
    model, tokens, limits = tiny_model(space.num_layers, scope, heads), tiny_tokens(), limits_in(space)
    truth = naive_table(model, tokens, space, context)
    found = search_oracle(model, tokens, space, context, budgets=limits, method=method)
    assert_within(found.route_ids, space, limits)
    for nll, ids in zip(found.nll, found.route_ids, strict=True):
        torch.testing.assert_close(truth.gather(-1, ids[..., None])[..., 0], nll, atol=1e-4, rtol=0)


@every_method
@pytest.mark.parametrize(("space", "scope", "heads"), KINDS)
def test_committed_losses_are_those_of_one_forward_with_the_picks(method, space, scope, heads):
    model, tokens, limits = tiny_model(space.num_layers, scope, heads), tiny_tokens(), limits_in(space)
    found = search_oracle(model, tokens, space, "committed", budgets=limits, method=method)
    assert_within(found.route_ids, space, limits)
    for nll, ids in zip(found.nll, found.route_ids, strict=True):
        torch.testing.assert_close(executed_nll(model, tokens, space, ids), nll, atol=1e-4, rtol=0)


@every_context
@pytest.mark.parametrize(
    "space", [RouteSpace(3), RouteSpace(3, (SKIP, SMALL, BIG)), *GROUPED.values()], ids=["two", "three", *GROUPED]
)
@pytest.mark.parametrize(
    "method",
    [
        pytest.param(Beam(width=1000), id="beam"),
        pytest.param(Sampled(routes=1000), id="sampled"),
    ],
)
def test_a_search_that_tries_all_routes_is_exact(method, context, space):
    model, tokens, limits = tiny_model(space.num_layers), tiny_tokens(), limits_in(space)
    exact = search_oracle(model, tokens, space, context, budgets=limits)
    found = search_oracle(model, tokens, space, context, budgets=limits, method=method)
    torch.testing.assert_close(found.nll, exact.nll, atol=1e-5, rtol=0)
    assert found.route_ids.equal(exact.route_ids)


@every_method
@every_context
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_out_and_spoils_nothing(method, context, side):
    model, tokens, space, mask = tiny_model(), tiny_tokens(), RouteSpace(3), tiny_padding(side)
    found = search_oracle(model, tokens, space, context, budgets=LIMITS, attention_mask=mask, method=method)
    padded = ~(mask[:, :-1] & mask[:, 1:]).bool()
    assert found.nll[:, padded].isnan().all()
    assert (found.route_ids[:, padded] == -1).all()
    assert_within(found.route_ids, space, LIMITS)
    if context != "committed":
        truth = naive_table(model, tokens, space, context, mask=mask)
        picked = truth.expand(2, -1, -1, -1).gather(-1, found.route_ids.clamp(min=0)[..., None])[..., 0]
        torch.testing.assert_close(picked[:, ~padded], found.nll[:, ~padded], atol=1e-4, rtol=0)


@every_method
@every_context
def test_memory_changes_nothing(method, context):
    model, tokens, space = tiny_model(4), tiny_tokens(), RouteSpace(4)
    wide, deep = (
        search_oracle(model, tokens, space, context, [1, 2], memory_bytes=size, method=method) for size in (2**30, 1)
    )
    torch.testing.assert_close(wide.nll, deep.nll, atol=1e-5, rtol=0)
    assert wide.route_ids.equal(deep.route_ids)


@every_method
def test_reference_may_be_any_routes(method):
    model, tokens, space = tiny_model(), tiny_tokens(), RouteSpace(3)
    reference = torch.randint(0, 3, (2, 6, 3), generator=torch.Generator().manual_seed(3))
    truth = naive_table(model, tokens, space, "reference", reference)
    found = search_oracle(model, tokens, space, "reference", [1], reference=reference, method=method)
    picked = truth.gather(-1, found.route_ids[0, ..., None])[..., 0]
    torch.testing.assert_close(picked, found.nll[0], atol=1e-4, rtol=0)


@every_method
@every_context
@pytest.mark.parametrize("branches", [(SMALL, BIG), (SKIP, SMALL, BIG)])
def test_thirty_layers(method, context, branches):
    model, tokens, space = tiny_model(30), tiny_tokens(1, 4), RouteSpace(30, branches)
    found = search_oracle(model, tokens, space, context, [10], method=method)
    assert_within(found.route_ids, space, [Exactly(10)])
    if context == "shared":
        for position, route in enumerate(space.decode(found.route_ids[0, 0])):
            nll = forward_nll(model, tokens, route)[0, position]
            torch.testing.assert_close(nll, found.nll[0, 0, position], atol=1e-4, rtol=0)
    if context == "committed":
        executed = executed_nll(model, tokens, space, found.route_ids[0])
        torch.testing.assert_close(executed, found.nll[0], atol=1e-4, rtol=0)


@every_method
def test_ties_go_to_the_cheaper_route(method):
    model, tokens, space = tiny_model(), tiny_tokens(), RouteSpace(3)
    torch.nn.init.zeros_(model.model.norm.weight)  # all logits are 0: equal losses that no CPU rounds differently
    found = search_oracle(model, tokens, space, budgets=[AtMost(2), Exactly(0)], method=method)
    assert (found.route_ids == 0).all()


@every_method
@every_context
def test_the_same_seed_finds_the_same(method, context):
    model, tokens, space = tiny_model(6), tiny_tokens(), RouteSpace(6)
    first, again = (
        search_oracle(model, tokens, space, context, [2], generator=torch.Generator().manual_seed(4), method=method)
        for _ in range(2)
    )
    assert first.route_ids.equal(again.route_ids)


@every_method
@pytest.mark.parametrize("budget", [FlopsShare(0.5), Schedule((1,)), OnAverage(1)])
def test_other_budgets_are_refused(method, budget):
    with pytest.raises(ValueError, match="take budgets Exactly and AtMost, got"):
        search_oracle(tiny_model(), tiny_tokens(), RouteSpace(3), budgets=[budget], method=method)


@every_method
def test_a_reference_outside_its_context_is_refused(method):
    with pytest.raises(ValueError, match="reference goes with context 'reference', got context 'shared'"):
        search_oracle(
            tiny_model(), tiny_tokens(), RouteSpace(3), "shared", [1], reference=torch.tensor([2, 2, 2]), method=method
        )


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Beam(width=0), "width must be at least 1, got 0"),
        (Sampled(routes=0), "routes must be at least 1, got 0"),
        (Local(width=0), "width must be at least 1, got 0"),
        (Local(steps=-1), "steps must be at least 0, got -1"),
        (Local(start=torch.zeros(3, 3).long()), r"start must broadcast to shape \[1, 2, 5\]"),
        (
            Local(start=torch.tensor(7)),
            r"start has routes with 3 .. 3 big layers, the budget is Exactly",
        ),
        (Local(start=torch.tensor(8)), "route ids must be in 0 .. 7"),
    ],
)
def test_impossible_options_are_refused(method, message):
    with pytest.raises(ValueError, match=message):
        search_oracle(tiny_model(), tiny_tokens(), RouteSpace(3), "reference", [1], method=method)


@every_method
def test_what_needs_every_route_is_refused(method):
    with pytest.raises(ValueError, match="DrawnLabels needs a method that tries every route: use 'exact'"):
        search_oracle(tiny_model(), tiny_tokens(), RouteSpace(3), method=method, reductions=[DrawnLabels()])


@every_method
def test_without_pruning_losses_are_those_of_the_routes_too(method):
    model, tokens, space = tiny_model(5), tiny_tokens(), RouteSpace(5)
    truth = naive_table(model, tokens, space, "shared")
    found = search_oracle(model, tokens, space, "shared", [2], method=method, prune=False)
    picked = truth.gather(-1, found.route_ids[0, ..., None])[..., 0]
    torch.testing.assert_close(picked, found.nll[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "space", [RouteSpace(3), RouteSpace(3, (SKIP, SMALL, BIG)), RouteSpace(4, groups=[[0], [1, 2], [3]])]
)
@pytest.mark.parametrize("limit", [Exactly(1), AtMost(1)])
def test_draws_are_uniform_within_the_budget(space, limit):
    drawn = draw_within(limit, Cells(space, 1, 4), (100, 200), torch.Generator().manual_seed(0))
    bigs = [1] if isinstance(limit, Exactly) else [0, 1]
    allowed = sorted(int(each) for big in bigs for each in space.ids_with(big))
    ids, counts = drawn.unique(return_counts=True)
    assert ids.tolist() == allowed
    assert ((counts / 20000 - 1 / len(allowed)).abs() < 0.015).all()
