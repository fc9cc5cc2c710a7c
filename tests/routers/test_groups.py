"""Routers of layers that vary in groups: one decision for a group, at its first layer, at the group's cost."""

import pytest
import torch

from duollm.errors import UserError
from duollm.models.branch import Branch
from duollm.routers.calibration import ExactBudget, calibrate, calibrate_exact
from duollm.routers.marginal import RandomGates, marginal_gains
from duollm.routers.registry import ROUTERS, load_router, make_router, save_router
from duollm.routes.space import RouteSpace
from tiny import random_ids, tiny_model
from tiny_training import router_training

SKIP, SMALL, BIG = Branch
LAYERS = 6
SPACES = {
    "equal": RouteSpace(LAYERS, (SKIP, BIG), 3),
    "unequal and fixed": RouteSpace(LAYERS, (SKIP, BIG), [[0, 3], [2, 4, 5]], {1: BIG}),
    "only fixed": RouteSpace(LAYERS, (SKIP, BIG), 4, {0: BIG, 3: SMALL}),
}
BATCHES = [random_ids(batch=8, tokens=32, seed=seed) for seed in range(2)]


@pytest.fixture(params=SPACES.values(), ids=SPACES)
def space(request):
    return request.param


@pytest.fixture
def model():
    return tiny_model(num_hidden_layers=LAYERS)


def grouped(kind, model, space):
    router = make_router(kind, model.config, ["skip", "big"], space).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return router


@pytest.mark.parametrize("kind", sorted(ROUTERS))
def test_every_kind_keeps_groups_whole_and_its_budget(kind, model, space):
    router = grouped(kind, model, space)
    budget = space.big_layers[len(space.big_layers) // 2]
    if hasattr(router, "routes_RL"):  # routes chosen whole come from labels of the same space
        router.routes_RL.copy_(space.decode(torch.arange(len(router.routes_RL)) % space.size))
        router.decide_at = space.leaders[0]
    router.set_budget(budget)
    calibrate(model, router, BATCHES, budget / LAYERS)
    calibrate_exact(model, router, BATCHES, budget)
    for held in (None, ExactBudget(router, budget)):
        routes_BTL = model(BATCHES[0], policy=router.policy(held)).routes
        space.encode(routes_BTL)  # raises if a group is not whole or a fixed layer differs
        if held:
            assert ((routes_BTL == BIG).sum(-1) == budget).all()


def test_an_attached_policy_goes_where_its_model_goes(model, space):
    router = grouped("linear", model, space)
    model.attach(router.policy(ExactBudget(router, space.big_layers[1]))).to("meta")
    assert router.weight_LCD.is_meta


@pytest.mark.parametrize("k", [0, 1, 2, 3, 4, 5, 6])
def test_an_exact_budget_looks_at_what_later_groups_add_up_to(model, k):
    space = RouteSpace(LAYERS, (SKIP, BIG), [[0], [1, 2], [3, 4, 5]])
    router = grouped("linear", model, space)
    routes_BTL = model(BATCHES[0], policy=router.policy(ExactBudget(router, k))).routes
    assert ((routes_BTL == BIG).sum(-1) == k).all()
    space.encode(routes_BTL)


def test_a_budget_that_groups_cannot_spend_is_refused(model):
    router = grouped("linear", model, SPACES["equal"])
    with pytest.raises(ValueError, match="a budget of 3 big layers is impossible here; allowed: 0, 2, 4, 6"):
        ExactBudget(router, 3)


def test_a_group_sees_the_state_of_its_first_layer_and_gains_what_its_layers_gain_together(model):
    space, ids = SPACES["equal"], random_ids()
    by_layer, by_group = (
        RandomGates(each, ids, torch.Generator().manual_seed(3)) for each in (RouteSpace(LAYERS, (SKIP, BIG)), space)
    )
    by_group.draw = by_layer.draw = lambda states: torch.full(states.shape[:2], int(BIG))
    of_layers_LBTC, _ = marginal_gains(model, ids, by_layer)
    of_groups_JBTC, _ = marginal_gains(model, ids, by_group)
    torch.testing.assert_close(of_groups_JBTC, of_layers_LBTC.unflatten(0, (3, 2)).mean(1), atol=1e-4, rtol=1e-4)


def test_sequential_remembers_what_a_group_costs(model, space, monkeypatch):
    router, left = grouped("sequential", model, space), {}
    router.set_budget(4)
    inputs_of = router.inputs_of

    def note(layer, states, memory):
        left[layer] = memory[..., -1] * LAYERS
        return inputs_of(layer, states, memory)

    monkeypatch.setattr(router, "inputs_of", note)
    choice_BTL = model(random_ids(), policy=router.policy()).routes
    assert list(left) == space.leaders
    spent_BT = torch.zeros(choice_BTL.shape[:2])
    for leader, layers in zip(space.leaders, space.group_sizes, strict=True):
        torch.testing.assert_close(left[leader], 4 - spent_BT)
        spent_BT += layers * (choice_BTL[..., leader] == BIG)


def test_a_saved_router_keeps_its_groups(model, space, tmp_path):
    router = grouped("sequential", model, space)
    save_router(router, tmp_path / "saved", {"kind": "sequential", "branches": ["skip", "big"]})
    loaded, _ = load_router(tmp_path / "saved", model.config)
    assert loaded.space == space
    ids = random_ids()
    assert torch.equal(model(ids, policy=loaded.policy()).routes, model(ids, policy=router.policy()).routes)
    with pytest.raises(UserError, match="not a router folder"):
        load_router(tmp_path / "saved", tiny_model(num_hidden_layers=3).config)


@pytest.mark.parametrize("kind", ["linear", "gumbel", "gains", "deep-gains", "sequential", "mixture-of-depths"])
def test_training_reaches_every_group_and_no_other_layer(kind, model, space, tmp_path):
    model.requires_grad_(False)
    router = make_router(kind, model.config, ["skip", "big"], space)
    router.fit(router_training(model, budget=0.5, run=tmp_path))
    weights = next(value for name, value in router.named_parameters() if name in ("weight_LCD", "weight_LED"))
    if kind != "deep-gains":
        trained = weights.abs().flatten(1).sum(1) > 0
        assert trained.nonzero()[:, 0].tolist() == space.leaders


def test_fixed_layers_are_heard_as_fixed(model):
    space = SPACES["only fixed"]
    routes = model(random_ids(), policy=grouped("linear", model, space).policy()).routes
    assert (routes[..., 0] == BIG).all()
    assert (routes[..., 3] == SMALL).all()
