import pytest
import torch

from duollm.models.branch import Branch
from duollm.routing.calibration import calibrate
from tiny import random_ids, tiny_model


def hard_share(model, router, batches):
    routes = torch.cat([model(batch, policy=router).routes for batch in batches])
    return (routes == Branch.BIG).double().mean().item()


@pytest.mark.parametrize("budget", [0.0, 0.1, 1 / 3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("branches", [(Branch.SMALL, Branch.BIG), tuple(Branch)])
def test_the_hard_share_meets_the_budget_within_a_percentage_point(make_router, budget, branches):
    model, router = tiny_model(), make_router(branches).train()
    batches = [random_ids(batch=8, tokens=32, seed=seed) for seed in range(2)]
    share = calibrate(model, router, batches, budget)
    assert share == pytest.approx(budget, abs=0.01)
    assert not router.training
    assert hard_share(model, router, batches) == pytest.approx(share, abs=1e-9)


def test_what_was_reached_is_told_even_if_it_is_far_off(make_router):
    """A router that cannot tell tokens apart takes big everywhere or nowhere."""
    model, router = tiny_model(), make_router()
    torch.nn.init.zeros_(router.weight_LCD)
    torch.nn.init.zeros_(router.bias_LC)
    batches = [random_ids()]
    assert calibrate(model, router, batches, 0.5) == hard_share(model, router, batches) == 0.0
