"""Tests of fixed routes: a branch where all tokens of a layer agree, the logits of token-wise choices in any case."""

import pytest
import torch

from duollm.models.branch import Branch
from duollm.models.policy import FixedRoutes
from tiny import random_ids, tiny_model

SMALL, BIG = Branch.SMALL, Branch.BIG


@pytest.mark.parametrize(
    ("routes", "branches"),
    [
        ([1, 2, 0], [SMALL, BIG, Branch.SKIP]),
        ([[[1, 2, 0]]], [SMALL, BIG, Branch.SKIP]),
        ([[[1, 2, 0], [1, 1, 0]]], [SMALL, None, Branch.SKIP]),
        ([[[1, 2, 2]], [[2, 2, 2]]], [None, BIG, BIG]),
    ],
)
def test_a_layer_has_one_branch_where_all_tokens_agree(routes, branches):
    routes = torch.tensor(routes)
    policy = FixedRoutes(routes)
    assert policy.branches == branches
    states = torch.zeros(*(routes.shape[:2] if routes.ndim == 3 else (1, 2)), 4)
    for layer, branch in enumerate(branches):
        choice, _ = policy(layer, states, None)
        if branch is None:
            assert torch.equal(choice.choice_N(), routes[..., layer].flatten())
        else:
            assert choice is branch


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("skip_scope", ["ffn", "layer"])
def test_equal_routes_of_all_tokens_are_one_route(tokens, skip_scope):
    model, ids = tiny_model(skip_scope=skip_scope), random_ids(tokens=tokens)
    route = torch.arange(model.config.num_hidden_layers) % 3
    by_token = route.expand(*ids.shape, -1)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, routes=by_token).logits, model(ids, routes=route).logits)
        reference = model(ids, routes=by_token, execution="reference").logits
        torch.testing.assert_close(model(ids, routes=by_token).logits, reference)
        assert torch.equal(model(ids, routes=by_token).routes, by_token)
