import pytest
import torch

from duollm.models.branch import Branch
from duollm.routers.baselines import EarlyExitRouter, MixtureOfDepthsRouter, RandomRouter
from duollm.routers.registry import make_router
from tiny import random_ids, tiny_config, tiny_model
from tiny_training import router_training


def test_a_token_that_has_left_stays_away(make_random):
    model, router = tiny_model(num_hidden_layers=6), make_random(kind=EarlyExitRouter, num_hidden_layers=6)
    router.price.fill_(-3.0)
    routes_BTL = model(random_ids(), policy=router).routes
    assert (routes_BTL.diff(dim=-1) <= 0).all(), "big after the exit"
    assert len(routes_BTL.flatten(0, 1).unique(dim=0)) > 2


@pytest.mark.parametrize("kind", [EarlyExitRouter, MixtureOfDepthsRouter])
def test_more_than_two_branches_are_refused(kind):
    with pytest.raises(ValueError, match="knows two branches, big and another, got 3"):
        kind(tiny_config(), tuple(Branch))


def test_confidence_is_taught_whether_the_final_prediction_is_there():
    model, ids = tiny_model().requires_grad_(False), random_ids()
    router = make_router("early-exit", model.config, ["small", "big"])
    loss, measured = router.loss_fn(router_training(model))(ids, 0, 0)
    torch.testing.assert_close(loss.detach(), torch.tensor(2.0).log())  # an untrained classifier says even odds
    states = []

    def watch(layer, states_BTD, memory):
        states.append(states_BTD)
        return torch.full(ids.shape, 2), memory

    final = model(ids, policy=watch).logits.argmax(-1)
    settled = [(model.lm_head(each).argmax(-1) == final).float().mean().item() for each in states]
    assert measured["settled_share"] == pytest.approx(sum(settled) / len(settled))


def test_experts_take_exactly_their_share_of_every_sequence():
    model = tiny_model().requires_grad_(False)
    router = make_router("mixture-of-depths", model.config, ["small", "big"])
    torch.nn.init.normal_(router.weight_LCD)
    router.loss_fn(router_training(model, budget=1 / 3))
    for weights in model(random_ids(2, 9), policy=router).choices:
        assert (weights[..., Branch.BIG].sum(1) == 3).all()
        assert torch.equal(weights.sum(-1), torch.ones(2, 9))


@pytest.mark.parametrize(("kind", "budget"), [("early-exit", None), ("mixture-of-depths", 0.5)])
def test_only_the_router_is_trained(training, kind, budget):
    model = tiny_model().requires_grad_(False)
    router = make_router(kind, model.config, ["small", "big"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    training(router, router.loss_fn(router_training(model, budget=budget)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.abs().sum() > 0 for parameter in router.parameters()), "a part without gradient"


@pytest.mark.parametrize("share", [0.2, 0.7])
def test_random_takes_its_share(make_random, share):
    router = make_random(kind=RandomRouter)
    positions = torch.arange(20_000)[None]
    margin_BT, _, _ = router.margin(1, torch.zeros(1, 20_000, 16), router.begin(positions))
    router.price.fill_(margin_BT.quantile(1 - share))
    choice_BT, _ = router(2, torch.zeros(1, 20_000, 16), router.begin(positions))
    assert (choice_BT == Branch.BIG).float().mean().item() == pytest.approx(share, abs=0.02)
