import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from duollm.models.branch import Branch
from duollm.routers.gains import DeepGainsRouter
from duollm.routers.linear import GumbelRouter, LinearRouter
from tiny import tiny_config

SMALL_BIG = (Branch.SMALL, Branch.BIG)


def test_scores_are_a_linear_map_per_layer(make_random):
    router, states_BTD = make_random(tuple(Branch)), torch.randn(2, 5, 16)
    for layer in range(3):
        scores_BTC, _ = router.scores(layer, states_BTD, None)
        expected = torch.einsum("btd,cd->btc", states_BTD, router.weight_LCD[layer]) + router.bias_LC[layer]
        torch.testing.assert_close(scores_BTC, expected)


def test_an_untrained_router_is_undecided():
    weights_BTC, _ = LinearRouter(tiny_config(), SMALL_BIG).train()(0, torch.randn(2, 5, 16), None)
    torch.testing.assert_close(weights_BTC, torch.tensor([0, 0.5, 0.5]).expand(2, 5, 3))


def test_gumbel_takes_one_branch_and_passes_a_gradient(make_random):
    router = make_random(kind=GumbelRouter).train()
    torch.manual_seed(0)
    weights_BTC, _ = router(1, torch.randn(2, 5, 16), None)
    assert set(weights_BTC.detach().unique().tolist()) == {0.0, 1.0}
    assert (weights_BTC.detach().sum(-1) == 1).all()
    (weights_BTC[..., Branch.BIG] * torch.randn(2, 5)).sum().backward()
    assert router.weight_LCD.grad[1].abs().sum() > 0


@pytest.mark.parametrize("kind", [LinearRouter, DeepGainsRouter], ids=["linear", "deep-gains"])
def test_flops_are_those_of_the_products(make_random, kind):
    router, states_BTD = make_random(tuple(Branch), kind=kind), torch.randn(2, 5, 16)
    with FlopCounterMode(display=False) as counter:
        for layer in range(3):
            router.scores(layer, states_BTD, None)
    assert router.flops_per_token() == counter.get_total_flops() / 10
    two = make_random(SMALL_BIG, kind=kind)
    dropped = 2 if kind is LinearRouter else 1  # linear takes one map for two branches, not two
    assert two.flops_per_token() == router.flops_per_token() - 2 * dropped * 3 * (16 if kind is LinearRouter else 32)
