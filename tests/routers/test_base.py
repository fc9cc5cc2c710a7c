import pytest
import torch

from duollm.flops import layer_parameters
from duollm.models.branch import Branch
from duollm.routers.base import branch_costs
from duollm.routers.linear import LinearRouter
from duollm.routers.registry import ROUTERS
from tiny import random_ids, tiny_config, tiny_model

SKIP, SMALL, BIG = Branch
SETS = [(SMALL, BIG), (SKIP, BIG), (SKIP, SMALL, BIG)]
TWO_BRANCHES = {"early-exit", "mixture-of-depths"}
NAMES = ["small big", "skip big", "all"]


@pytest.fixture
def states_BTD():
    return torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("branches", SETS, ids=NAMES)
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_in_training_it_mixes_by_a_softmax(make_router, states_BTD, branches, temperature):
    router = make_router(branches).train()
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
def test_in_evaluation_the_best_branch_at_its_price_is_taken(make_router, states_BTD, branches, price):
    router = make_router(branches)
    router.price.fill_(price)
    if SKIP not in branches or SMALL not in branches:
        cost = {branches[0]: 0.0, BIG: 1.0}  # with two branches the price is what big has to win by
    else:
        cost = dict(zip(Branch, branch_costs(tiny_config()).tolist(), strict=True))
    for layer in range(3):
        choice_BT, _ = router(layer, states_BTD, None)
        scores_BTC, _ = router.scores(layer, states_BTD, None)
        for choice, scores in zip(choice_BT.flatten().tolist(), scores_BTC.flatten(0, 1).tolist(), strict=True):
            worth = [score - price * cost[branch] for score, branch in zip(scores, branches, strict=True)]
            assert choice == branches[worth.index(max(worth))]


@pytest.mark.parametrize("branches", SETS, ids=NAMES)
def test_big_is_taken_up_to_its_highest_price_and_else_the_best_of_the_others(make_router, states_BTD, branches):
    router = make_router(branches)
    router.price.fill_(0.4)
    for layer in range(3):
        highest_BT, _, _ = router.weigh(layer, states_BTD, None)
        without_big_BT, _ = router.decide(layer, states_BTD, None, torch.tensor(torch.inf))
        scores_BTC, _ = router.scores(layer, states_BTD, None)
        worth_BTC = scores_BTC - 0.4 * router.cost_C
        assert torch.equal(without_big_BT, torch.tensor(branches)[worth_BTC[..., :-1].argmax(-1)])
        for price in highest_BT.flatten().tolist():
            for offset in (-1e-3, 1e-3):
                choice_BT, _ = router.decide(layer, states_BTD, None, torch.tensor(price + offset))
                assert torch.equal(choice_BT, torch.where(highest_BT > price + offset, int(BIG), without_big_BT))


def test_a_cold_mixture_is_the_hard_choice(make_router, states_BTD):
    router = make_router((SKIP, SMALL, BIG))
    hard, _ = router(1, states_BTD, None)
    router.train().temperature = 1e-4
    soft, _ = router(1, states_BTD, None)
    assert torch.equal(soft.argmax(-1), hard)


@pytest.mark.parametrize("kind", sorted(set(ROUTERS) - {"mixture-of-depths"}))  # decides by its predictor
def test_the_margin_is_the_difference_of_the_scores(make_router, states_BTD, kind):
    router = make_router(kind=ROUTERS[kind])
    scored = told = router.begin(torch.arange(5).expand(2, 5))
    for layer in range(3):
        scores_BTC, scored = router.scores(layer, states_BTD, scored)
        margin_BT, told = router.margin(layer, states_BTD, told)
        torch.testing.assert_close(margin_BT, scores_BTC[..., 1] - scores_BTC[..., 0])


@pytest.mark.parametrize("scope", ["ffn", "layer"])
def test_costs_are_in_units_of_what_big_adds_to_small(scope):
    config = tiny_config(skip_scope=scope)
    parameters = layer_parameters(config)
    skip, small, big = branch_costs(config).tolist()
    assert (small, big) == (0, 1)
    assert skip == pytest.approx((parameters.skip - parameters.small) / (parameters.big - parameters.small))
    assert skip < 0


@pytest.mark.parametrize("branches", [(SKIP, SMALL), (BIG,), (BIG, SMALL)], ids=["no big", "one", "descending"])
def test_branches_that_make_no_router_are_refused(branches):
    with pytest.raises(ValueError, match=r"needs big and at least one other branch, in ascending order, got \['"):
        LinearRouter(tiny_config(), branches)


@pytest.mark.parametrize("kind", ROUTERS)
class TestEveryKind:
    """What must hold for a router of any kind in use."""

    @pytest.mark.parametrize("skip_scope", ["ffn", "layer"])
    def test_choices_do_not_see_later_tokens(self, make_router, kind, skip_scope):
        model, router = tiny_model(skip_scope=skip_scope), make_router(kind=ROUTERS[kind], skip_scope=skip_scope)
        ids = random_ids()
        changed = ids.clone()
        changed[:, 5:] = (ids[:, 5:] + 1) % model.config.vocab_size
        before, after = (model(each, policy=router).routes for each in (ids, changed))
        assert torch.equal(before[:, :5], after[:, :5])
        assert kind == "random" or not torch.equal(before[:, 5:], after[:, 5:])

    def test_choices_are_the_same_when_decoding_with_a_cache(self, make_router, kind):
        branches = (SKIP, BIG) if kind in TWO_BRANCHES else (SKIP, SMALL, BIG)
        model, router, ids = tiny_model(), make_router(branches, kind=ROUTERS[kind]), random_ids()
        whole, cache, steps = model(ids, policy=router).routes, None, []
        for position in range(ids.shape[1]):
            output = model(ids[:, position : position + 1], policy=router, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.routes)
        assert len(whole.unique()) > 1
        assert torch.equal(torch.cat(steps, dim=1), whole)

    def test_choices_do_not_depend_on_the_neighbours_in_the_batch(self, make_router, kind):
        model, router, ids = tiny_model(), make_router(kind=ROUTERS[kind]), random_ids(batch=4)
        together = model(ids, policy=router).routes
        alone = torch.cat([model(row[None], policy=router).routes for row in ids])
        assert torch.equal(together, alone)

    def test_choices_are_the_same_while_the_model_is_in_training_mode(self, make_router, kind):
        model, router, ids = tiny_model(), make_router(kind=ROUTERS[kind]), random_ids()
        in_use = model(ids, policy=router).routes
        assert torch.equal(model.train()(ids, policy=router, use_cache=False).routes, in_use)
        reference = model(ids, policy=router, use_cache=False, execution="reference").routes
        assert torch.equal(reference, in_use)
