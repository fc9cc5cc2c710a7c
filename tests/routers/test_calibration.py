import pytest
import torch

from duollm.models.branch import Branch
from duollm.routers.base import branch_costs
from duollm.routers.calibration import ExactBudget, calibrate, calibrate_exact, mean_cost
from duollm.routers.registry import ROUTERS
from tiny import random_ids, tiny_model

LAYERS = 6
BATCHES = [random_ids(batch=8, tokens=32, seed=seed) for seed in range(2)]


def naive_cost(model, router, batches):
    routes = torch.cat([model(batch, policy=router).routes for batch in batches])
    return branch_costs(model.config, router.branches)[routes].double().mean().item()


@pytest.mark.parametrize("budget", [0.0, 0.1, 1 / 3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("branches", [(Branch.SMALL, Branch.BIG), tuple(Branch)], ids=["small big", "all"])
@pytest.mark.parametrize("scale", [1e-3, 100.0])
def test_the_budget_is_met_within_a_percentage_point(make_random, budget, branches, scale):
    model, router = tiny_model(), make_random(branches).train()
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.mul_(scale)
    spent = calibrate(model, router, BATCHES, budget)
    assert spent == pytest.approx(budget, abs=0.01)
    assert not router.training
    assert naive_cost(model, router, BATCHES) == mean_cost(model, router, BATCHES) == pytest.approx(spent, abs=1e-6)


def test_what_was_reached_is_told_even_if_it_is_far_off(make_random):
    """A router that cannot tell tokens apart takes big everywhere or nowhere."""
    model, router = tiny_model(), make_random()
    torch.nn.init.zeros_(router.weight_LCD)
    torch.nn.init.zeros_(router.bias_LC)
    assert calibrate(model, router, BATCHES, 0.4) == naive_cost(model, router, BATCHES) == 0.0


@pytest.mark.parametrize("branches", [(Branch.SMALL, Branch.BIG), tuple(Branch)], ids=["small big", "all"])
@pytest.mark.parametrize("big_layers", [1, 3, 5])
def test_spending_exactly_keeps_the_share_of_every_layer(make_random, branches, big_layers):
    model, router = tiny_model(num_hidden_layers=6), make_random(branches, num_hidden_layers=6)
    batch = [torch.cat(BATCHES)]
    calibrate(model, router, batch, big_layers / 6, tolerance=1e-4)
    calibrate_exact(model, router, batch, big_layers)
    free_L, held_L = (
        (model(batch[0], policy=policy).routes == Branch.BIG).float().mean((0, 1))
        for policy in (router, ExactBudget(router, big_layers))
    )
    wanted_L = free_L * big_layers / free_L.sum()
    torch.testing.assert_close(held_L, wanted_L, atol=0.01, rtol=0)


@pytest.mark.parametrize("big_layers", [0, 6])
def test_without_a_choice_there_is_nothing_to_calibrate(make_random, big_layers):
    model, router = tiny_model(num_hidden_layers=6), make_random(num_hidden_layers=6)
    calibrate_exact(model, router, BATCHES, big_layers)
    routes = model(BATCHES[0], policy=ExactBudget(router, big_layers)).routes
    assert ((routes == Branch.BIG).sum(-1) == big_layers).all()
    assert router.exact_price_L.isfinite().all()


@pytest.mark.parametrize("kind", sorted(ROUTERS))
def test_every_kind_can_be_calibrated_for_both_ways_of_spending(make_random, kind):
    model, router = tiny_model(num_hidden_layers=6), make_random(num_hidden_layers=6, kind=ROUTERS[kind])
    router.set_budget(2)
    calibrate(model, router, BATCHES, 1 / 3)
    calibrate_exact(model, router, BATCHES, 2)
    routes = model(BATCHES[0], policy=ExactBudget(router, 2)).routes
    assert ((routes == Branch.BIG).sum(-1) == 2).all()
    assert router.exact_price_L.isfinite().all()


@pytest.mark.parametrize("big_layers", range(LAYERS + 1))
@pytest.mark.parametrize("price", [-100.0, 0.0, 100.0])
def test_every_token_spends_exactly_its_budget(make_random, big_layers, price):
    router = make_random(num_hidden_layers=LAYERS)
    router.exact_price_L.fill_(price)
    routes = tiny_model(num_hidden_layers=LAYERS)(random_ids(), policy=ExactBudget(router, big_layers)).routes
    assert ((routes == Branch.BIG).sum(-1) == big_layers).all()
    if 0 < big_layers < LAYERS and price:  # a greedy token spends at once, a stingy one as late as it can
        first = routes[..., :big_layers] if price < 0 else routes[..., -big_layers:]
        assert (first == Branch.BIG).all()


def test_the_router_decides_where_there_is_a_choice(make_random):
    model, router, ids = tiny_model(num_hidden_layers=LAYERS), make_random(num_hidden_layers=LAYERS), random_ids()
    free, held = (model(ids, policy=policy).routes for policy in (router, ExactBudget(router, 3)))
    assert torch.equal(held[..., 0], free[..., 0])
    assert torch.equal(held[..., 1], free[..., 1])
    assert len(held.flatten(0, 1).unique(dim=0)) > 1


def test_skip_counts_as_not_big(make_random):
    router = make_random(tuple(Branch), num_hidden_layers=LAYERS)
    routes = tiny_model(num_hidden_layers=LAYERS)(random_ids(), policy=ExactBudget(router, 2)).routes
    assert ((routes == Branch.BIG).sum(-1) == 2).all()
    assert (routes == Branch.SKIP).any()


def test_a_budget_beyond_the_layers_is_refused(make_random):
    with pytest.raises(ValueError, match=r"a budget of 7 big layers is impossible here; allowed: 0 \.\. 6"):
        ExactBudget(make_random(num_hidden_layers=LAYERS), 7)
