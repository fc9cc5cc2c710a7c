import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from duollm.config import RouterConfig
from duollm.models.branch import Branch
from duollm.routers.base import mixture_loss
from duollm.routers.gains import DeepGainsRouter
from duollm.routers.linear import GumbelRouter, LinearRouter, marginals
from duollm.routers.registry import make_router
from duollm.routes.space import RouteSpace
from tiny import random_ids, tiny_config, tiny_model
from tiny_labels import labels_of, made_up_labels
from tiny_training import router_training

SMALL_BIG = (Branch.SMALL, Branch.BIG)

NAMES = [["small", "big"], ["skip", "small", "big"]]
CONFIG = RouterConfig(label_temperature=0.1, distilled_share=0.5)


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


def loss_of(model, router, labels, steps, **changes):
    config = CONFIG.model_copy(update=changes)
    return router.loss_fn(router_training(model, config, 1 / 3, steps, labels=labels))


@pytest.mark.parametrize("branches", NAMES, ids=["two", "three"])
def test_marginals_by_brute_force(branches):
    router = make_router("distilled", tiny_model().config, branches)
    space = RouteSpace(3, router.branches)
    labels = made_up_labels(space, windows=2, tokens=4)
    indices = labels.with_big(1, 1)
    probability_WNR = (-labels.losses(indices, 0.0) / 0.7).softmax(-1)
    got = marginals(probability_WNR, space.decode(labels.route_ids_R[indices]), router)
    for window in range(2):
        for token in range(3):
            weight = {}
            for identity in space.ids_with(big=1).tolist():
                weight[identity] = torch.exp(-labels.losses_SWNR[1, window, token, identity] / 0.7)
            total = sum(weight.values())
            for layer in range(3):
                for column, branch in enumerate(router.branches):
                    taking = [
                        w for identity, w in weight.items() if space.decode(torch.tensor(identity))[layer] == branch
                    ]
                    expected = sum(taking, torch.tensor(0.0)) / total
                    torch.testing.assert_close(got[window, token, layer, column], expected)


def depends_on_the_token(model):
    """Labels by which tokens of low id want layer 2 and the others layer 0; nobody wants layer 1."""
    space, ids_WT = RouteSpace(3), random_ids(16, 8, seed=7)
    losses_WNR = torch.ones(16, 7, 8)
    low = ids_WT[:, :-1] < model.config.vocab_size // 2
    losses_WNR[..., 1] = torch.where(low, 0.0, 1.0)  # ids: 1 is big in layer 2, 4 in layer 0
    losses_WNR[..., 4] = torch.where(low, 1.0, 0.0)
    return labels_of(space, ids_WT, losses_WNR), low


def test_it_learns_which_token_wants_which_layer(training):
    model = tiny_model().requires_grad_(False)
    labels, low = depends_on_the_token(model)
    router = make_router("distilled", model.config, ["small", "big"])
    loss_fn = loss_of(model, router, labels, 60, distilled_share=1.0)
    first = [loss_fn(random_ids(16), step, 0)[0].item() for step in range(5)]
    training(router, loss_fn, steps=60, learning_rate=0.1)
    last = [loss_fn(random_ids(16), step, 0)[0].item() for step in range(5)]
    assert sum(last) < 0.8 * sum(first)
    routes = model(labels.token_ids_WT[:, :-1], policy=router.eval()).routes
    right = (routes[..., 0] == Branch.BIG) != low
    assert right.float().mean() > 0.75
    assert (routes[..., 1] == Branch.BIG).float().mean() < 0.05, "a layer that nobody wants, in spite of the balance"


def test_it_starts_from_what_the_oracle_does_on_average():
    model = tiny_model()
    labels, low = depends_on_the_token(model)
    router = make_router("distilled", model.config, ["small", "big"])
    loss_of(model, router, labels, 10)
    low_share = low.float().mean().item()
    expected = torch.tensor([[low_share, 1 - low_share], [0.99, 0.01], [1 - low_share, low_share]])
    torch.testing.assert_close(router.bias_LC.softmax(-1), expected, atol=0.02, rtol=0)


def test_then_it_is_tuned_on_the_language_models_loss():
    model, ids = tiny_model(), random_ids()
    labels, _ = depends_on_the_token(model)
    router = make_router("distilled", model.config, ["small", "big"])
    loss_fn = loss_of(model, router, labels, 10)
    assert "imitation" in loss_fn(ids, 4, 0)[1]
    torch.manual_seed(0)
    tuned, _ = loss_fn(ids, 5, 0)
    torch.manual_seed(0)
    expected, _ = mixture_loss(router, router_training(model, CONFIG, 1 / 3), 5)(ids, 0, 0)
    torch.testing.assert_close(tuned, expected)


def test_the_model_stays_as_it_is(training):
    model = tiny_model().requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    router = make_router("distilled", model.config, ["small", "big"])
    training(router, loss_of(model, router, made_up_labels(RouteSpace(3)), 6))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert router.weight_LCD.abs().sum(dim=(1, 2)).min() > 0, "a layer without gradient"
