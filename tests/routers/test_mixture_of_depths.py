import pytest
import torch

from duollm.models.branch import Branch
from duollm.routers.mixture_of_depths import MixtureOfDepthsRouter
from duollm.routers.registry import make_router
from tiny import random_ids, tiny_config, tiny_model
from tiny_training import router_training


def test_more_than_two_branches_are_refused():
    with pytest.raises(ValueError, match="knows two branches, big and another, got 3"):
        MixtureOfDepthsRouter(tiny_config(), tuple(Branch))


def test_experts_take_exactly_their_share_of_every_sequence():
    model = tiny_model().requires_grad_(False)
    router = make_router("mixture-of-depths", model.config, ["small", "big"])
    torch.nn.init.normal_(router.weight_LCD)
    router.loss_fn(router_training(model, budget=1 / 3))
    for weights in model(random_ids(2, 9), policy=router).choices:
        assert (weights[..., Branch.BIG].sum(1) == 3).all()
        assert torch.equal(weights.sum(-1), torch.ones(2, 9))


def test_only_the_router_is_trained(training):
    model = tiny_model().requires_grad_(False)
    router = make_router("mixture-of-depths", model.config, ["small", "big"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    training(router, router.loss_fn(router_training(model, budget=0.5)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.abs().sum() > 0 for parameter in router.parameters()), "a part without gradient"
