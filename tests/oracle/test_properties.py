"""The oracle against every fixed policy at equal budget, on random tiny models."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duollm import Branch, RouteSpace, search_oracle
from duollm.oracle.budgets import AtMost, Exactly, FlopsShare, OnAverage
from duollm.routes.sampling import draw_route_ids
from naive_oracle import forward_nll, tiny_model, tiny_tokens

SKIP, SMALL, BIG = Branch
ROUNDING = 1e-4


@st.composite
def cases(draw):
    """A random model, tokens, and the routes of a space over its layers."""
    layers, scope = draw(st.integers(2, 3)), draw(st.sampled_from(["ffn", "layer"]))
    branches = draw(st.sampled_from([(SMALL, BIG), (SKIP, BIG), (SKIP, SMALL, BIG)]))
    seed = draw(st.integers(0, 1000))
    model = tiny_model(layers, scope, draw(st.sampled_from([1, 2])), seed)
    return model, tiny_tokens(1, 5, seed), RouteSpace(layers, branches), torch.Generator().manual_seed(seed)


def alone(model, tokens, route, position):
    """The loss at a position that alone leaves the all-big reference."""
    routes = torch.full((1, tokens.shape[1], len(route)), int(BIG))
    routes[:, position] = route
    return forward_nll(model, tokens, routes)[0, position]


@settings(max_examples=8, deadline=None)
@given(case=cases())
def test_shared_oracle_is_no_worse_than_any_route_for_all_tokens(case):
    model, tokens, space, generator = case
    found = search_oracle(model, tokens, space)
    for big, nll in zip(found.big_layers, found.nll, strict=True):
        for route in space.decode(draw_route_ids(space, big, (3,), generator)):
            assert (nll <= forward_nll(model, tokens, route) + ROUNDING).all()


@settings(max_examples=8, deadline=None)
@given(case=cases())
def test_reference_oracle_is_no_worse_than_any_route_of_the_token_itself(case):
    model, tokens, space, generator = case
    found = search_oracle(model, tokens, space, "reference")
    for big, nll in zip(found.big_layers, found.nll, strict=True):
        for position, route in enumerate(space.decode(draw_route_ids(space, big, (4,), generator))):
            assert nll[0, position] <= alone(model, tokens, route, position) + ROUNDING


@settings(max_examples=8, deadline=None)
@given(case=cases(), context=st.sampled_from(["shared", "reference"]))
def test_a_wider_budget_is_never_worse(case, context):
    model, tokens, space, _ = case
    budgets = [AtMost(1), AtMost(2), FlopsShare(0.5), FlopsShare(1), Exactly(1), OnAverage(1)]
    found = search_oracle(model, tokens, space, context, budgets=budgets)
    one, two, half, whole, exactly, average = found.nll
    assert (two <= one).all()
    assert (whole <= half).all()
    assert (one <= exactly).all()
    assert average.mean() <= exactly.mean() + ROUNDING
    assert space.count_big(found.route_ids[5]).float().mean() <= 1


@pytest.mark.parametrize("big", [1, 2])
@settings(max_examples=5, deadline=None)
@given(case=cases())
def test_committed_oracle_takes_at_every_token_the_best_route_after_its_own_picks(big, case):
    model, tokens, space, generator = case
    found = search_oracle(model, tokens, space, "committed", [big])
    picked = torch.full((1, tokens.shape[1], space.num_layers), int(BIG))
    for position, route in enumerate(space.decode(draw_route_ids(space, big, (4,), generator))):
        picked[:, position] = route
        assert found.nll[0, 0, position] <= forward_nll(model, tokens, picked)[0, position] + ROUNDING
        picked[:, position] = space.decode(found.route_ids[0, 0, position])
