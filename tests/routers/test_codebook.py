import pytest
import torch

from duollm.models.branch import Branch
from duollm.routers.codebook import MOST_ROUTES, CodebookRouter
from duollm.routers.exact import ExactBudget
from duollm.routers.registry import load_router, save_router
from tiny import random_ids, tiny_model

LAYERS, AT = 5, 2
PREFIX = [2, 1]


@pytest.fixture
def router(make_router):
    """Three routes in use, of 2, 2 and 3 big layers, alike in the first two."""
    router = make_router(kind=CodebookRouter, num_hidden_layers=LAYERS)
    router.decide_at = AT
    with torch.no_grad():
        router.routes_RL[:3] = torch.tensor([[*PREFIX, 2, 1, 1], [*PREFIX, 1, 1, 2], [*PREFIX, 1, 2, 2]])
        router.bias_R[:3] = 0
        router.bias_R[3:] = -torch.inf
    return router


@pytest.fixture
def model():
    return tiny_model(num_hidden_layers=LAYERS)


def naive_routes(router, model, ids, price=0.0, among=range(3)):
    """Route by route: the states at the layer of decision when all tokens are on the common start."""
    seen = []

    def note(layer, states, memory):
        seen.append(states)
        return torch.full(states.shape[:2], PREFIX[layer] if layer < AT else 1), None

    model(ids, policy=note)
    best = torch.full(ids.shape, -torch.inf)
    routes = torch.zeros(*ids.shape, LAYERS, dtype=torch.long)
    for row in among:
        big = (router.routes_RL[row] == Branch.BIG).sum()
        worth = seen[AT] @ router.weight_RD[row] + router.bias_R[row] - price * big
        routes[worth > best] = router.routes_RL[row]
        best = torch.maximum(best, worth)
    return routes


@pytest.mark.parametrize("price", [-3.0, 0.0, 3.0])
def test_every_token_takes_the_route_of_highest_worth(router, model, price):
    router.price.fill_(price)
    ids = random_ids(4)
    routes = model(ids, policy=router).routes
    assert torch.equal(routes, naive_routes(router, model, ids, price))
    assert len(routes.flatten(0, 1).unique(dim=0)) > 1


def test_under_an_exact_budget_only_routes_that_spend_it_are_taken(router, model):
    router.price.fill_(-100.0)  # without the budget all would take the route of three
    ids = random_ids(4)
    assert (model(ids, policy=router).routes == Branch.BIG).sum(-1).eq(3).all()
    assert torch.equal(
        model(ids, policy=ExactBudget(router, 2)).routes, naive_routes(router, model, ids, among=range(2))
    )


def test_an_exact_budget_that_no_route_spends_is_met_nevertheless(router, model):
    routes = model(random_ids(), policy=ExactBudget(router, 4)).routes
    assert ((routes == Branch.BIG).sum(-1) == 4).all()


def test_soft_choices_are_shares_of_the_routes_softmax(router):
    states_BTD = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    router.train().temperature = 0.7
    share_BTR = (router.worth(states_BTD, None) / 0.7).softmax(-1)
    memory = router.begin(torch.zeros(2, 3))
    for layer in range(LAYERS):
        weights_BT3, memory = router(layer, states_BTD, memory)
        for branch in Branch:
            expected = share_BTR[..., router.routes_RL[:, layer] == branch].sum(-1)
            torch.testing.assert_close(weights_BT3[..., branch], expected)


def test_a_saved_codebook_chooses_as_before(router, model, tmp_path):
    save_router(router, tmp_path / "saved", {"kind": "codebook", "branches": ["small", "big"]})
    loaded, _ = load_router(tmp_path / "saved", model.config)
    assert loaded.decide_at == AT
    ids = random_ids()
    assert torch.equal(model(ids, policy=loaded).routes, model(ids, policy=router).routes)


def test_flops_are_those_of_the_routes_in_use(router):
    assert router.flops_per_token() == 2 * 3 * 16
    assert CodebookRouter(tiny_model().config, router.branches).flops_per_token() == 2 * MOST_ROUTES * 16
