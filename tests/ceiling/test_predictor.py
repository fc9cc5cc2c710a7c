import pytest
import torch

from duollm.ceiling.predictor import GainPredictor, all_big_states, exact_routes, margins, price_for, priced_routes
from duollm.models.branch import Branch
from tiny import random_ids, tiny_config, tiny_model

SKIP, SMALL, BIG = Branch


@pytest.mark.parametrize("skip_scope", ["ffn", "layer"])
def test_states_are_what_a_policy_sees_when_all_is_big(skip_scope):
    model, ids = tiny_model(skip_scope=skip_scope), random_ids()
    seen = []

    def policy(layer, states_BTD, memory):
        seen.append(states_BTD)
        return torch.full(ids.shape, int(BIG)), None

    model(ids, policy=policy)
    states_BTF = all_big_states(model, ids)
    torch.testing.assert_close(states_BTF, torch.cat(seen, dim=-1))
    assert not states_BTF.requires_grad


@pytest.fixture
def random_predictor():
    def make(depth, branches=(SMALL, BIG)):
        torch.manual_seed(0)
        predictor = GainPredictor(tiny_config(), branches, depth, width=8)
        for parameter in predictor.parameters():
            torch.nn.init.normal_(parameter)
        return predictor.requires_grad_(False)

    return make


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_predictor_sees_its_layers_and_no_further(random_predictor, depth):
    predictor = random_predictor(depth)
    states_NF, told = torch.randn(5, 3 * 16), (torch.full((5,), 0.5), torch.zeros(5, 3))
    before = predictor(states_NF, *told)
    assert before.shape == (5, 3, 2)
    for layer in range(3):
        changed_NF = states_NF.clone()
        changed_NF[:, 16 * layer : 16 * (layer + 1)] += 1
        assert torch.equal(predictor(changed_NF, *told), before) == (layer > depth)
    assert not torch.equal(predictor(states_NF, told[0] + 0.1, told[1]), before)


def test_interactions_are_what_big_at_a_layer_changes(random_predictor):
    predictor = random_predictor(1, (SKIP, SMALL, BIG))
    states_NF, share_N, big_NL = torch.randn(4, 48), torch.rand(4), torch.zeros(4, 3)
    before = predictor(states_NF, share_N, big_NL)
    for layer in range(3):
        big_NL = torch.zeros(4, 3)
        big_NL[:, layer] = 1
        change_NLC = predictor(states_NF, share_N, big_NL) - before
        torch.testing.assert_close(change_NLC, predictor.interactions()[layer].expand(4, 3, 3), atol=1e-4, rtol=1e-4)


def test_an_untrained_predictor_knows_no_difference():
    predictor = GainPredictor(tiny_config(), (SKIP, SMALL, BIG), 2, width=8)
    assert torch.equal(predictor(torch.randn(4, 48), torch.rand(4), torch.ones(4, 3)), torch.zeros(4, 3, 3))


def test_margins_compare_big_with_the_best_other_branch():
    gains_LC = torch.tensor([[1.0, 2.0, 5.0], [3.0, 0.0, 1.0]])
    margin_L, otherwise_L = margins(gains_LC, torch.zeros(2, 2, 3), (SKIP, SMALL, BIG))
    assert margin_L.tolist() == [3.0, -2.0]
    assert otherwise_L.tolist() == [SMALL, SKIP]


@pytest.mark.parametrize("branches", [(SMALL, BIG), (SKIP, SMALL, BIG)], ids=["two", "three"])
def test_layers_are_taken_in_turn(branches):
    """The naive truth: one token at a time, always the layer that gains most given those taken before."""
    generator = torch.Generator().manual_seed(3)
    gains_NLC = torch.randn(6, 5, len(branches), generator=generator)
    interactions_LLC = 0.5 * torch.randn(5, 5, len(branches), generator=generator)
    margin_NL, _ = margins(gains_NLC, interactions_LLC, branches)
    for gains_LC, margin_L in zip(gains_NLC, margin_NL, strict=True):
        taken, least = [], float("inf")
        while len(taken) < 5:
            gained = {}
            for layer in set(range(5)) - set(taken):
                at_C = gains_LC[layer] + sum(interactions_LLC[before, layer] for before in taken)
                at_C = at_C + interactions_LLC[layer, layer] / 2
                gained[layer] = (at_C[-1] - at_C[:-1].max()).item()
            layer = max(gained, key=gained.get)
            least = min(least, gained[layer])
            assert margin_L[layer].item() == pytest.approx(least, abs=1e-3)
            taken.append(layer)
        assert margin_L.argsort(descending=True).tolist() == taken


MARGIN_NL = torch.tensor([[0.3, -0.1, 0.2], [0.9, 0.8, 0.7], [-0.5, -0.4, -0.3]])
OTHERWISE_NL = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1]])


@pytest.mark.parametrize(
    ("k", "routes"),
    [
        (0, [[1, 1, 0], [1, 1, 1], [0, 1, 1]]),
        (1, [[2, 1, 0], [2, 1, 1], [0, 1, 2]]),
        (2, [[2, 1, 2], [2, 2, 1], [0, 2, 2]]),
        (3, [[2, 2, 2], [2, 2, 2], [2, 2, 2]]),
    ],
)
def test_exact_routes_take_the_layers_that_gain_most(k, routes):
    assert exact_routes(MARGIN_NL, OTHERWISE_NL, k).tolist() == routes


@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_priced_routes_spend_k_on_average(k):
    routes_NL = priced_routes(MARGIN_NL, OTHERWISE_NL, price_for(MARGIN_NL, k))
    assert (routes_NL == BIG).sum() == 3 * k
    assert torch.equal(routes_NL[routes_NL != BIG], OTHERWISE_NL[routes_NL != BIG])


def test_a_price_gives_more_to_tokens_that_gain_more():
    routes_NL = priced_routes(MARGIN_NL, OTHERWISE_NL, price_for(MARGIN_NL, 1))
    assert routes_NL.tolist() == [[1, 1, 0], [2, 2, 2], [0, 1, 1]]
