import pytest
import torch

from duollm.ceiling.predictor import GainPredictor, all_big_states, make_predictors
from duollm.config import CeilingConfig
from duollm.errors import UserError
from duollm.models.branch import Branch
from duollm.records.keys import SHUFFLED
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


def test_there_is_a_predictor_per_depth_and_a_control():
    predictors = make_predictors(tiny_model(), CeilingConfig(depths=[0, 2], width=8), (SMALL, BIG), seed=0)
    assert {name: each.depth for name, each in predictors.items()} == {"l0": 0, "l2": 2, SHUFFLED: 2}
    other = make_predictors(tiny_model(), CeilingConfig(depths=[0, 2], width=8), (SMALL, BIG), seed=1)
    assert not predictors["l0"].inner.weight.equal(other["l0"].inner.weight)


@pytest.mark.parametrize(
    ("layers", "depths"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (12, [0, 3, 6, 9, 11])], ids=lambda each: str(each)
)
def test_depths_are_spread_over_the_network(layers, depths):
    assert CeilingConfig().depths_in(layers) == depths


@pytest.mark.parametrize("depths", [[3], [-1, 2]])
def test_a_depth_that_is_not_there_is_refused(depths):
    with pytest.raises(UserError, match=r"ceiling\.depths holds \[.*\]; the model has layers 0 \.\. 2"):
        make_predictors(tiny_model(), CeilingConfig(depths=depths), (SMALL, BIG), seed=0)
