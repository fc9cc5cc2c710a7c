import pytest
import torch

from duollm.config import RouterConfig
from duollm.models.branch import Branch
from duollm.routers.baselines_training import confidence_loss, expert_choice_loss
from duollm.routers.lesson import Lesson
from duollm.routers.registry import make_router
from tiny import random_ids, tiny_model


def lesson(kind, budget=None):
    model = tiny_model().requires_grad_(False)
    return Lesson(model, make_router(kind, model.config, ["small", "big"]), RouterConfig(), budget, steps=6, seed=0)


def test_confidence_is_taught_whether_the_final_prediction_is_there():
    one, ids = lesson("early-exit"), random_ids()
    loss, measured = confidence_loss(one)(ids, 0, 0)
    torch.testing.assert_close(loss.detach(), torch.tensor(2.0).log())  # an untrained classifier says even odds
    states = []

    def watch(layer, states_BTD, memory):
        states.append(states_BTD)
        return torch.full(ids.shape, 2), memory

    final = one.model(ids, policy=watch).logits.argmax(-1)
    settled = [(one.model.lm_head(each).argmax(-1) == final).float().mean().item() for each in states]
    assert measured["settled_share"] == pytest.approx(sum(settled) / len(settled))


def test_experts_take_exactly_their_share_of_every_sequence():
    one, ids = lesson("mixture-of-depths", budget=1 / 3), random_ids(2, 9)
    torch.nn.init.normal_(one.router.weight_LCD)
    expert_choice_loss(one)
    for weights in one.model(ids, policy=one.router).choices:
        assert (weights[..., Branch.BIG].sum(1) == 3).all()
        assert torch.equal(weights.sum(-1), torch.ones(2, 9))


@pytest.mark.parametrize("kind", ["early-exit", "mixture-of-depths"])
def test_only_the_router_is_trained(training, kind):
    one = lesson(kind, budget=0.5)
    before = {name: value.clone() for name, value in one.model.state_dict().items()}
    loss_fn = {"early-exit": confidence_loss, "mixture-of-depths": expert_choice_loss}[kind](one)
    training(one.router, loss_fn)
    assert all(torch.equal(value, before[name]) for name, value in one.model.state_dict().items())
    assert all(parameter.abs().sum() > 0 for parameter in one.router.parameters()), "a part without gradient"
