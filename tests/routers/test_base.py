import pytest
import torch

from duollm.config import RouterConfig
from duollm.flops import layer_parameters
from duollm.models.branch import Branch
from duollm.routers.base import Listener, branch_costs, budget_loss
from duollm.routers.linear import LinearRouter
from duollm.routers.registry import ROUTERS, make_router
from tiny import random_ids, random_routes, tiny_config, tiny_model
from tiny_training import router_training

SKIP, SMALL, BIG = Branch
SETS = [(SMALL, BIG), (SKIP, BIG), (SKIP, SMALL, BIG)]
TWO_BRANCHES = {"early-exit", "mixture-of-depths"}
CONFIG = RouterConfig(temperatures=(2.0, 0.5), budget_weight=3.0)
NAMES = ["small big", "skip big", "all"]


@pytest.fixture
def states_BTD():
    return torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("branches", SETS, ids=NAMES)
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_in_training_it_mixes_by_a_softmax(make_random, states_BTD, branches, temperature):
    router = make_random(branches).train()
    router.temperature = temperature
    for layer in range(3):
        weights_BTC, memory = router(layer, states_BTD, None)
        assert weights_BTC.shape == (2, 5, 3)
        assert memory is None
        torch.testing.assert_close(weights_BTC.sum(-1), torch.ones(2, 5))
        scores_BTC, _ = router.scores(layer, states_BTD, None)
        torch.testing.assert_close(weights_BTC[..., list(branches)], (scores_BTC / temperature).softmax(-1))
        absent = [branch for branch in Branch if branch not in branches]
        assert (weights_BTC[..., absent] == 0).all()


@pytest.mark.parametrize("branches", SETS, ids=NAMES)
@pytest.mark.parametrize("price", [0.0, -1.5, 1.5])
def test_in_evaluation_the_best_branch_at_its_price_is_taken(make_random, states_BTD, branches, price):
    router = make_random(branches)
    router.price.fill_(price)
    if SKIP not in branches or SMALL not in branches:
        cost = {branches[0]: 0.0, BIG: 1.0}  # with two branches the price is what big has to win by
    else:
        cost = dict(zip(Branch, branch_costs(tiny_config(), branches).tolist(), strict=True))
    for layer in range(3):
        choice_BT, _ = router(layer, states_BTD, None)
        scores_BTC, _ = router.scores(layer, states_BTD, None)
        for choice, scores in zip(choice_BT.flatten().tolist(), scores_BTC.flatten(0, 1).tolist(), strict=True):
            worth = [score - price * cost[branch] for score, branch in zip(scores, branches, strict=True)]
            assert choice == branches[worth.index(max(worth))]


@pytest.mark.parametrize("branches", SETS, ids=NAMES)
def test_big_is_taken_up_to_its_highest_price_and_else_the_best_of_the_others(make_random, states_BTD, branches):
    router = make_random(branches)
    router.price.fill_(0.4)
    for layer in range(3):
        highest_BT, _, _ = router.margin(layer, states_BTD, None)
        without_big_BT, _ = router.decide(layer, states_BTD, None, torch.tensor(torch.inf))
        scores_BTC, _ = router.scores(layer, states_BTD, None)
        worth_BTC = scores_BTC - 0.4 * router.cost_C
        assert torch.equal(without_big_BT, torch.tensor(branches)[worth_BTC[..., :-1].argmax(-1)])
        for price in highest_BT.flatten().tolist():
            for offset in (-1e-3, 1e-3):
                choice_BT, _ = router.decide(layer, states_BTD, None, torch.tensor(price + offset))
                assert torch.equal(choice_BT, torch.where(highest_BT > price + offset, int(BIG), without_big_BT))


def test_a_cold_mixture_is_the_hard_choice(make_random, states_BTD):
    router = make_random((SKIP, SMALL, BIG))
    hard, _ = router(1, states_BTD, None)
    router.train().temperature = 1e-4
    soft, _ = router(1, states_BTD, None)
    assert torch.equal(soft.argmax(-1), hard)


@pytest.mark.parametrize(
    "kind", sorted(set(ROUTERS) - {"mixture-of-depths", "codebook", "knn", "window"})
)  # decide otherwise
def test_the_margin_is_the_difference_of_the_scores(make_random, states_BTD, kind):
    router = make_random(kind=ROUTERS[kind])
    scored = told = router.begin(torch.arange(5).expand(2, 5))
    for layer in range(3):
        scores_BTC, scored = router.scores(layer, states_BTD, scored)
        margin_BT, _, told = router.margin(layer, states_BTD, told)
        torch.testing.assert_close(margin_BT, scores_BTC[..., 1] - scores_BTC[..., 0])


@pytest.mark.parametrize("scope", ["ffn", "layer"])
def test_costs_are_in_units_of_what_big_adds_to_small(scope):
    config = tiny_config(skip_scope=scope)
    parameters = layer_parameters(config)
    skip, small, big = branch_costs(config, (SKIP, SMALL, BIG)).tolist()
    assert (small, big) == (0, 1)
    assert skip == pytest.approx((parameters.skip - parameters.small) / (parameters.big - parameters.small))
    assert skip < 0
    skip, small, big = branch_costs(config, (SKIP, BIG)).tolist()  # of two branches one costs 0
    assert (skip, big) == (0, 1)
    assert small == pytest.approx((parameters.small - parameters.skip) / (parameters.big - parameters.skip))


@pytest.mark.parametrize("branches", [(SKIP, SMALL), (BIG,), (BIG, SMALL)], ids=["no big", "one", "descending"])
def test_branches_that_make_no_router_are_refused(branches):
    with pytest.raises(ValueError, match=r"needs big and at least one other branch, in ascending order, got \['"):
        LinearRouter(tiny_config(), branches)


@pytest.mark.parametrize("kind", ROUTERS)
class TestEveryKind:
    """What must hold for a router of any kind in use."""

    @pytest.mark.parametrize("skip_scope", ["ffn", "layer"])
    def test_choices_do_not_see_later_tokens(self, make_random, kind, skip_scope):
        model, router = tiny_model(skip_scope=skip_scope), make_random(kind=ROUTERS[kind], skip_scope=skip_scope)
        ids = random_ids()
        changed = ids.clone()
        changed[:, 5:] = (ids[:, 5:] + 1) % model.config.vocab_size
        before, after = (model(each, policy=router).routes for each in (ids, changed))
        assert torch.equal(before[:, :5], after[:, :5])
        assert kind in {"random", "window"} or not torch.equal(
            before[:, 5:], after[:, 5:]
        )  # a window's prompt is shorter

    def test_choices_are_the_same_when_decoding_with_a_cache(self, make_random, kind):
        branches = (SKIP, BIG) if kind in TWO_BRANCHES else (SKIP, SMALL, BIG)
        model, router, ids = tiny_model(), make_random(branches, kind=ROUTERS[kind]), random_ids()
        whole, cache, steps = model(ids, policy=router).routes, None, []
        for position in range(ids.shape[1]):
            output = model(ids[:, position : position + 1], policy=router, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.routes)
        assert len(whole.unique()) > 1
        assert torch.equal(torch.cat(steps, dim=1), whole)

    def test_choices_do_not_depend_on_the_neighbours_in_the_batch(self, make_random, kind):
        model, router, ids = tiny_model(), make_random(kind=ROUTERS[kind]), random_ids(batch=4)
        together = model(ids, policy=router).routes
        alone = torch.cat([model(row[None], policy=router).routes for row in ids])
        assert torch.equal(together, alone)

    def test_choices_are_the_same_while_the_model_is_in_training_mode(self, make_random, kind):
        model, router, ids = tiny_model(), make_random(kind=ROUTERS[kind]), random_ids()
        in_use = model(ids, policy=router).routes
        assert torch.equal(model.train()(ids, policy=router, use_cache=False).routes, in_use)
        reference = model(ids, policy=router, use_cache=False, execution="reference").routes
        assert torch.equal(reference, in_use)


def test_a_listener_hears_what_a_router_sees_on_given_routes():
    model, ids, routes = tiny_model(), random_ids(), random_routes()
    listener, seen = Listener(routes), []

    def policy(layer, states_BTD, memory):
        seen.append(states_BTD)
        return routes[..., layer], None

    assert torch.equal(model(ids, policy=listener).routes, routes)
    model(ids, policy=policy)
    assert torch.equal(torch.stack(listener.states_LBTD), torch.stack(seen))


def test_only_the_router_is_trained(training):
    model = tiny_model().requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    router = make_router("linear", model.config, ["small", "big"])
    training(router, router.loss_fn(router_training(model, CONFIG, 1 / 3)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert router.weight_LCD.abs().sum(dim=(1, 2)).min() > 0, "a layer without gradient"
    assert router.bias_LC.abs().min() > 0


def test_the_loss_is_nll_plus_weighted_budget_loss():
    model, ids = tiny_model(), random_ids()
    router = make_router("linear", model.config, ["small", "big"])
    torch.nn.init.normal_(router.weight_LCD)
    loss, measured = router.loss_fn(router_training(model, CONFIG, 0.2, steps=5))(ids, 2, 0)
    router.temperature = 1.0  # halfway from 2 to 0.5 on a geometric path
    output = model(ids, labels=ids, policy=router.train())
    torch.testing.assert_close(loss, output.loss + 3 * budget_loss(output.choices, 0.2, router))
    share = torch.stack([weights[..., Branch.BIG] for weights in output.choices]).mean()
    assert measured == pytest.approx({"nll": output.loss.item(), "big_share": share.item(), "temperature": 1.0})


def test_the_temperature_falls_geometrically():
    model, ids = tiny_model(), random_ids()
    router = make_router("linear", model.config, ["small", "big"])
    loss_fn = router.loss_fn(router_training(model, CONFIG, 0.5, steps=5))
    got = [loss_fn(ids, step, 0)[1]["temperature"] for step in range(5)]
    assert got == pytest.approx([2, 2**0.5, 1, 2**-0.5, 0.5])
    assert router.loss_fn(router_training(model, CONFIG, 0.5, steps=1))(ids, 0, 0)[1]["temperature"] == 2


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
