import pytest
import torch

from duollm.models.branch import Branch
from duollm.routers.baselines import EarlyExitRouter, MixtureOfDepthsRouter, RandomRouter
from tiny import random_ids, tiny_config, tiny_model


def test_a_token_that_has_left_stays_away(make_router):
    model, router = tiny_model(num_hidden_layers=6), make_router(kind=EarlyExitRouter, num_hidden_layers=6)
    router.price.fill_(-3.0)
    routes_BTL = model(random_ids(), policy=router).routes
    assert (routes_BTL.diff(dim=-1) <= 0).all(), "big after the exit"
    assert len(routes_BTL.flatten(0, 1).unique(dim=0)) > 2


@pytest.mark.parametrize("share", [0.2, 0.7])
def test_random_takes_its_share(make_router, share):
    router = make_router(kind=RandomRouter)
    positions = torch.arange(20_000)[None]
    margin_BT, _ = router.margin(1, torch.zeros(1, 20_000, 16), router.begin(positions))
    router.price.fill_(margin_BT.quantile(1 - share))
    choice_BT, _ = router(2, torch.zeros(1, 20_000, 16), router.begin(positions))
    assert (choice_BT == Branch.BIG).float().mean().item() == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("kind", [EarlyExitRouter, MixtureOfDepthsRouter])
def test_more_than_two_branches_are_refused(kind):
    with pytest.raises(ValueError, match="knows two branches, big and another, got 3"):
        kind(tiny_config(), tuple(Branch))
