import pytest
import torch

from duollm.models.branch import Branch
from duollm.routers.exact import ExactBudget
from tiny import random_ids, tiny_model

LAYERS = 6


@pytest.mark.parametrize("big_layers", range(LAYERS + 1))
@pytest.mark.parametrize("price", [-100.0, 0.0, 100.0])
def test_every_token_spends_exactly_its_budget(make_router, big_layers, price):
    router = make_router(num_hidden_layers=LAYERS)
    router.exact_price_L.fill_(price)
    routes = tiny_model(num_hidden_layers=LAYERS)(random_ids(), policy=ExactBudget(router, big_layers)).routes
    assert ((routes == Branch.BIG).sum(-1) == big_layers).all()
    if 0 < big_layers < LAYERS and price:  # a greedy token spends at once, a stingy one as late as it can
        first = routes[..., :big_layers] if price < 0 else routes[..., -big_layers:]
        assert (first == Branch.BIG).all()


def test_the_router_decides_where_there_is_a_choice(make_router):
    model, router, ids = tiny_model(num_hidden_layers=LAYERS), make_router(num_hidden_layers=LAYERS), random_ids()
    free, held = (model(ids, policy=policy).routes for policy in (router, ExactBudget(router, 3)))
    assert torch.equal(held[..., 0], free[..., 0])
    assert torch.equal(held[..., 1], free[..., 1])
    assert len(held.flatten(0, 1).unique(dim=0)) > 1


def test_skip_counts_as_not_big(make_router):
    router = make_router(tuple(Branch), num_hidden_layers=LAYERS)
    routes = tiny_model(num_hidden_layers=LAYERS)(random_ids(), policy=ExactBudget(router, 2)).routes
    assert ((routes == Branch.BIG).sum(-1) == 2).all()
    assert (routes == Branch.SKIP).any()


def test_a_budget_beyond_the_layers_is_refused(make_router):
    with pytest.raises(ValueError, match=r"big_layers must be in 0 \.\. 6, got 7"):
        ExactBudget(make_router(num_hidden_layers=LAYERS), 7)
