"""Static as the prior: the best pattern, what groups are worth beside it, and routers that start from it."""

import pytest
import torch

from duollm.measure.executor import policy_losses
from duollm.models.branch import Branch
from duollm.routers import static
from duollm.routers.base import by_group
from duollm.routers.calibration import calibrate, mean_cost
from duollm.routers.marginal import RandomGates
from duollm.routers.registry import load_router, make_router, save_router
from duollm.routers.static import SCALES, calibrate_around, chosen_scale, patterns_of, static_priors
from duollm.routes.space import RouteSpace
from tiny import random_ids, tiny_model

SKIP, SMALL, BIG = Branch
LAYERS = 6
SPACE = RouteSpace(LAYERS, (SKIP, BIG), 3)
BATCHES = [random_ids(16, 24, seed=seed) for seed in range(2)]


@pytest.fixture(scope="module")
def model():
    """What the first FFN adds is most of the stream: its slope says little, and nothing works without it."""
    model = tiny_model(num_hidden_layers=LAYERS, hidden_size=32).requires_grad_(False)
    model.model.layers[0].mlp.big.down_proj.weight *= 8
    return model


@pytest.fixture(scope="module")
def own_text(model):
    """Text that the model with all layers big has written, so that every pattern without a layer loses."""
    generator, ids = torch.Generator().manual_seed(0), random_ids(48, 1)
    for _ in range(15):
        probabilities = model(ids, use_cache=False).logits[:, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(probabilities, 1, generator=generator)], dim=1)
    return ids


@pytest.fixture(scope="module")
def priors(model, own_text):
    return static_priors(model, SPACE, own_text[:16], [0, 2, 4, 6])


def loss(model, ids, **how):
    return policy_losses(model, ids, **how)[0].mean().item()


def test_the_pattern_of_a_budget_is_the_best_of_all(model, own_text, priors):
    for k, prior in priors.items():
        losses = {route: loss(model, own_text[:16], routes=SPACE.decode(torch.tensor(route))) for route in range(8)}
        with_k = {route: value for route, value in losses.items() if SPACE.count_big(torch.tensor(route)) == k}
        assert SPACE.encode(prior.route_L).item() == min(with_k, key=with_k.get)


def test_a_group_is_worth_what_the_loss_changes_with_it(model, own_text, priors):
    prior = priors[2]
    for group, layers in enumerate(SPACE.group_layers):
        with_it, without = prior.route_L.clone(), prior.route_L.clone()
        with_it[list(layers)], without[list(layers)] = BIG, SKIP
        change = loss(model, own_text[:16], routes=without) - loss(model, own_text[:16], routes=with_it)
        assert prior.worth_J[group].item() == pytest.approx(100 * change / 2, abs=1e-2)


@pytest.mark.parametrize("k", [0, 2, 4, 6])
def test_the_price_parts_the_groups_with_big_from_the_others(priors, k):
    big_J = priors[k].route_L[SPACE.leaders] == BIG
    assert torch.equal(priors[k].worth_J > priors[k].price, big_J)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_groups_of_several_sizes_add_up_to_the_budget(model, k):
    space = RouteSpace(LAYERS, (SKIP, BIG), [[0], [1, 2], [3, 4]], {5: SKIP})
    route_L = static_priors(model, space, BATCHES[0], [k])[k].route_L
    assert (route_L == BIG).sum() == k
    space.encode(route_L)


def test_three_branches_are_refused(model):
    with pytest.raises(ValueError, match="static as the prior needs two branches"):
        static_priors(model, RouteSpace(LAYERS, (SKIP, SMALL, BIG)), BATCHES[0], [2])


@pytest.fixture
def misled(model):
    """A router whose mean gains rank the layers upside down, with differences between tokens that mean nothing."""
    router = make_router("gains", model.config, ["skip", "big"], SPACE).eval()
    with torch.no_grad():
        torch.nn.init.normal_(router.weight_LCD, std=0.3, generator=torch.Generator().manual_seed(0))
        router.bias_LC[:, 1] = torch.arange(LAYERS).float() * 10
    return router


@pytest.mark.parametrize("k", [2, 4])
def test_where_static_is_best_a_misled_router_is_as_good_as_static(model, own_text, priors, misled, k):
    fitted, fresh = [own_text[:16], own_text[16:32]], own_text[32:]
    best = loss(model, fresh, routes=priors[k].route_L)
    calibrate(model, misled, fitted, k / LAYERS)
    assert loss(model, fresh, policy=misled.policy()) > best + 0.2
    spent = calibrate_around(model, misled, fitted, priors[k], k)
    assert loss(model, fresh, policy=misled.policy()) < best + 0.02
    assert spent == pytest.approx(k / LAYERS, abs=0.01)
    assert mean_cost(model, misled, fitted) == pytest.approx(spent, abs=1e-6)


@pytest.mark.parametrize("scale", SCALES)
def test_a_group_is_big_where_its_worth_and_the_tokens_difference_exceed_the_price(
    model, own_text, priors, misled, monkeypatch, scale
):
    monkeypatch.setattr(static, "SCALES", (scale, 0.0))
    monkeypatch.setattr(static, "chosen_scale", lambda losses: scale)
    calibrate_around(model, misled, [own_text], priors[4], 4)
    seen = {}

    def note(layer, states, memory):
        seen[layer] = misled.margin(layer, states, None)[0]
        return priors[4].route_L[layer].expand(states.shape[:2]), None

    model(own_text, policy=misled.policy(note))
    margin_BT = seen[0]  # later layers see what earlier choices did
    worth_BT = priors[4].worth_J[0] + scale * (margin_BT - margin_BT.mean())
    price = misled.price * scale if scale else priors[4].price
    routes = model(own_text, policy=misled.policy()).routes
    surely = (worth_BT - price).abs() > 1e-3
    assert torch.equal((routes[..., 0] == BIG)[surely], (worth_BT > price)[surely])


def test_offsets_are_saved(model, own_text, priors, misled, tmp_path):
    calibrate_around(model, misled, [own_text], priors[4], 4)
    save_router(misled, tmp_path / "saved", {"kind": "gains", "branches": ["skip", "big"]})
    loaded, _ = load_router(tmp_path / "saved", model.config)
    ids = random_ids()
    assert torch.equal(model(ids, policy=loaded.policy()).routes, model(ids, policy=misled.policy()).routes)


def test_a_scale_must_surely_gain():
    nothing, noise = torch.zeros(16, 5), torch.randn(16, 5, generator=torch.Generator().manual_seed(0))
    assert chosen_scale({1.0: noise - noise.mean(), 0.25: nothing, 0.0: nothing}) == 0.0
    assert chosen_scale({1.0: 0.1 * noise - 1, 0.25: nothing - 0.5, 0.0: nothing}) == 1.0
    assert chosen_scale({1.0: 9 * noise - 1, 0.25: nothing - 0.5, 0.0: nothing}) == 0.25


def test_gates_follow_patterns_but_for_one_group_per_token(model, priors):
    ids = random_ids(64, 30)
    gates = RandomGates(SPACE, ids, torch.Generator().manual_seed(1))
    gates.follow(*patterns_of(priors, SPACE))
    routes = model(ids, policy=by_group(gates, SPACE)).routes
    assert len(gates.pattern_BL.unique(dim=0)) == len(priors)
    assert torch.equal(gates.big_B1[:, 0], (gates.pattern_BL == BIG).float().mean(1))
    SPACE.encode(routes)
    flipped = (routes != gates.pattern_BL[:, None])[..., SPACE.leaders].float().mean().item()
    assert 0.05 < flipped < 1 / 3
