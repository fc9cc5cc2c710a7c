import pytest
import torch

from duollm.models.branch import Branch
from duollm.routing.linear import LinearRouter, budget_loss
from tiny import random_ids, tiny_model

SKIP, SMALL, BIG = Branch
SETS = [(SMALL, BIG), (SKIP, BIG), (SKIP, SMALL, BIG)]


@pytest.fixture
def states_BTD():
    return torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(4))


def naive_scores(router, layer, states_BTD):
    return states_BTD @ router.weight_LCD[layer].T + router.bias_LC[layer]


@pytest.mark.parametrize("branches", SETS)
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_in_training_it_mixes_by_a_softmax(make_router, states_BTD, branches, temperature):
    router = make_router(branches).train()
    router.temperature = temperature
    for layer in range(3):
        weights_BTC, memory = router(layer, states_BTD, None)
        assert weights_BTC.shape == (2, 5, 3)
        assert memory is None
        torch.testing.assert_close(weights_BTC.sum(-1), torch.ones(2, 5))
        expected = (naive_scores(router, layer, states_BTD) / temperature).softmax(-1)
        torch.testing.assert_close(weights_BTC[..., list(branches)], expected)
        absent = [branch for branch in Branch if branch not in branches]
        assert (weights_BTC[..., absent] == 0).all()


@pytest.mark.parametrize("branches", SETS)
@pytest.mark.parametrize("threshold", [0.0, -1.5, 1.5])
def test_in_evaluation_big_must_win_by_more_than_the_threshold(make_router, states_BTD, branches, threshold):
    router = make_router(branches)
    router.threshold.fill_(threshold)
    for layer in range(3):
        choice_BT, _ = router(layer, states_BTD, None)
        for choice, scores in zip(
            choice_BT.flatten().tolist(), naive_scores(router, layer, states_BTD).flatten(0, 1).tolist(), strict=True
        ):
            best_other = max(range(len(branches) - 1), key=lambda index: scores[index])
            wins = scores[-1] - scores[best_other] > threshold
            assert choice == (BIG if wins else branches[best_other])
        margin_BT = router.margin(layer, states_BTD)
        assert torch.equal(margin_BT > threshold, choice_BT == BIG)


def test_a_cold_mixture_is_the_hard_choice(make_router, states_BTD):
    router = make_router((SKIP, SMALL, BIG))
    hard, _ = router(1, states_BTD, None)
    router.train().temperature = 1e-4
    soft, _ = router(1, states_BTD, None)
    assert torch.equal(soft.argmax(-1), hard)


def test_an_untrained_router_is_undecided(states_BTD):
    weights_BTC, _ = LinearRouter(3, 16, (SMALL, BIG)).train()(0, states_BTD, None)
    torch.testing.assert_close(weights_BTC, torch.tensor([0, 0.5, 0.5]).expand(2, 5, 3))


def test_the_budget_loss_by_hand():
    """Two sequences; shares of big over layers and tokens are 0.5 and 0.2, so at 0.25: (0.25^2 + 0.05^2) / 2."""
    big_LBT = torch.tensor([[[1.0, 0.6], [0.0, 0.0]], [[0.0, 0.4], [0.8, 0.0]]])
    weights = [torch.stack([torch.zeros_like(big), 1 - big, big], dim=-1) for big in big_LBT]
    assert budget_loss(weights, 0.25).item() == pytest.approx((0.25**2 + 0.05**2) / 2)


def test_layers_may_differ_as_long_as_their_mean_holds():
    always, never = torch.tensor([0.0, 0.0, 1.0]).expand(2, 4, 3), torch.tensor([0.0, 1.0, 0.0]).expand(2, 4, 3)
    assert budget_loss([always, never], 0.5).item() == 0
    assert budget_loss([always, always], 0.5).item() == pytest.approx(0.25)


@pytest.mark.parametrize("skip_scope", ["ffn", "layer"])
def test_choices_do_not_see_later_tokens(make_router, skip_scope):
    model, router, ids = tiny_model(skip_scope=skip_scope), make_router(), random_ids()
    changed = ids.clone()
    changed[:, 5:] = (ids[:, 5:] + 1) % model.config.vocab_size
    before, after = (model(each, policy=router).routes for each in (ids, changed))
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5:], after[:, 5:])


def test_choices_are_the_same_when_decoding_with_a_cache(make_router):
    model, router, ids = tiny_model(), make_router((SKIP, SMALL, BIG)), random_ids()
    whole, cache, steps = model(ids, policy=router).routes, None, []
    for position in range(ids.shape[1]):
        output = model(ids[:, position : position + 1], policy=router, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.routes)
    assert set(whole.unique().tolist()) == set(Branch)
    assert torch.equal(torch.cat(steps, dim=1), whole)


def test_a_router_without_big_is_refused():
    with pytest.raises(ValueError, match=r"needs big .* got \['SKIP', 'SMALL'\]"):
        LinearRouter(3, 16, (SKIP, SMALL))
