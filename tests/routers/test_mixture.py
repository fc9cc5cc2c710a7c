import pytest
import torch

from duollm.config import RouterConfig
from duollm.models.branch import Branch
from duollm.routers.lesson import Lesson
from duollm.routers.mixture import budget_loss, mixture_loss
from duollm.routers.registry import make_router
from tiny import random_ids, tiny_model

CONFIG = RouterConfig(temperatures=(2.0, 0.5), budget_weight=3.0)


def lesson(model, router, budget, steps):
    return Lesson(model, router, CONFIG, budget, steps, seed=0)


def test_only_the_router_is_trained(training):
    model = tiny_model().requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    router = make_router("linear", model.config, ["small", "big"])
    training(router, mixture_loss(lesson(model, router, 1 / 3, steps=6)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert router.weight_LCD.abs().sum(dim=(1, 2)).min() > 0, "a layer without gradient"
    assert router.bias_LC.abs().min() > 0


def test_the_loss_is_nll_plus_weighted_budget_loss():
    model, ids = tiny_model(), random_ids()
    router = make_router("linear", model.config, ["small", "big"])
    torch.nn.init.normal_(router.weight_LCD)
    loss, measured = mixture_loss(lesson(model, router, 0.2, steps=5))(ids, 2, 0)
    router.temperature = 1.0  # halfway from 2 to 0.5 on a geometric path
    output = model(ids, labels=ids, policy=router.train())
    torch.testing.assert_close(loss, output.loss + 3 * budget_loss(output.choices, 0.2, router))
    share = torch.stack([weights[..., Branch.BIG] for weights in output.choices]).mean()
    assert measured == pytest.approx({"nll": output.loss.item(), "big_share": share.item(), "temperature": 1.0})


def test_the_temperature_falls_geometrically():
    model, ids = tiny_model(), random_ids()
    router = make_router("linear", model.config, ["small", "big"])
    loss_fn = mixture_loss(lesson(model, router, 0.5, steps=5))
    got = [loss_fn(ids, step, 0)[1]["temperature"] for step in range(5)]
    assert got == pytest.approx([2, 2**0.5, 1, 2**-0.5, 0.5])
    assert mixture_loss(lesson(model, router, 0.5, steps=1))(ids, 0, 0)[1]["temperature"] == 2


class TestBudgetLoss:
    router = make_router("linear", tiny_model().config, ["small", "big"])

    def test_by_hand(self):
        """Two sequences; shares of big over layers and tokens are 0.5 and 0.2, so at 0.25: (0.25^2 + 0.05^2) / 2."""
        big_LBT = torch.tensor([[[1.0, 0.6], [0.0, 0.0]], [[0.0, 0.4], [0.8, 0.0]]])
        weights = [torch.stack([torch.zeros_like(big), 1 - big, big], dim=-1) for big in big_LBT]
        assert budget_loss(weights, 0.25, self.router).item() == pytest.approx((0.25**2 + 0.05**2) / 2)

    def test_layers_may_differ_as_long_as_their_mean_holds(self):
        always, never = torch.tensor([0.0, 0.0, 1.0]).expand(2, 4, 3), torch.tensor([0.0, 1.0, 0.0]).expand(2, 4, 3)
        assert budget_loss([always, never], 0.5, self.router).item() == 0
        assert budget_loss([always, always], 0.5, self.router).item() == pytest.approx(0.25)

    def test_skipping_saves(self):
        router = make_router("linear", tiny_model().config, ["skip", "small", "big"])
        skipped = torch.tensor([1.0, 0.0, 0.0]).expand(2, 4, 3)
        assert budget_loss([skipped], 0.0, router).item() == pytest.approx(router.cost_C[0].item() ** 2)
