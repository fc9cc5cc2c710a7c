import json

import pytest
import torch

from duollm.ceiling.predictor import GainPredictor, all_big_states, ceiling_loss, make_predictors, margins
from duollm.config import CeilingConfig
from duollm.errors import UserError
from duollm.models.branch import Branch
from duollm.records.keys import SHUFFLED
from duollm.routers.marginal import RandomGates, centred, marginal_gains
from duollm.routes.space import RouteSpace
from tiny import random_ids, tiny_config, tiny_model
from tiny_training import ALONE

SKIP, SMALL, BIG = Branch
BRANCHES = (SMALL, BIG)
SPACE = RouteSpace(3, BRANCHES)
CONFIG = CeilingConfig(depths=[0, 2], width=8)


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
        predictor = GainPredictor(tiny_config(), RouteSpace(3, branches), depth, width=8)
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
    predictor = GainPredictor(tiny_config(), RouteSpace(3, (SKIP, SMALL, BIG)), 2, width=8)
    assert torch.equal(predictor(torch.randn(4, 48), torch.rand(4), torch.ones(4, 3)), torch.zeros(4, 3, 3))


def test_there_is_a_predictor_per_depth_and_a_control():
    predictors = make_predictors(tiny_model(), CeilingConfig(depths=[0, 2], width=8), SPACE, seed=0)
    assert {name: each.depth for name, each in predictors.items()} == {"l0": 0, "l2": 2, SHUFFLED: 2}
    other = make_predictors(tiny_model(), CeilingConfig(depths=[0, 2], width=8), SPACE, seed=1)
    assert not predictors["l0"].inner.weight.equal(other["l0"].inner.weight)


@pytest.mark.parametrize(
    ("layers", "depths"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (12, [0, 3, 6, 9, 11])], ids=lambda each: str(each)
)
def test_depths_are_spread_over_the_network(layers, depths):
    assert CeilingConfig().depths_in(layers) == depths


@pytest.mark.parametrize("depths", [[3], [-1, 2]])
def test_a_depth_that_is_not_there_is_refused(depths):
    with pytest.raises(UserError, match=r"ceiling\.depths holds \[.*\]; the model has layers 0 \.\. 2"):
        make_predictors(tiny_model(), CeilingConfig(depths=depths), SPACE, seed=0)


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


class Told(torch.nn.Module):
    """Stands in for a predictor: says what it is told, and keeps what it was asked; routes by the first feature."""

    shape_JC = (3, 2)

    def __init__(self, told_NLC):
        super().__init__()
        self.told_NLC = torch.nn.Parameter(told_NLC)

    def forward(self, states, share, big):
        if states.ndim == 3:  # to choose the routes: big where a token's first feature of the layer is high
            return torch.stack([torch.zeros_like(big), states[..., ::16]], dim=-1)
        self.states_NF, self.share_N, self.big_NL = states, share, big
        return self.told_NLC

    def interactions(self):
        return torch.zeros(3, 3, 2)


@pytest.fixture
def frozen():
    return tiny_model().requires_grad_(False)


def test_who_says_the_gains_has_no_loss(frozen):
    """The labels are marginal gains x 100 at the routes of the step; the states are of all big."""
    ids, loss_seed = random_ids(3, 6), 5
    predictors = torch.nn.ModuleDict({"l2": Told(torch.zeros(15, 3, 2)), SHUFFLED: Told(torch.zeros(15, 3, 2))})
    drawn = []
    original = frozen.forward

    def forward(*arguments, **named):
        drawn.append(named.get("policy"))
        return original(*arguments, **named)

    frozen.forward = forward
    loss_fn = ceiling_loss(frozen, predictors, SPACE, 8, loss_seed, ALONE)
    loss_fn(ids, 4, 0)
    weights = [gate.detach().requires_grad_() for gate in drawn[0].gates_JBT3]

    class Same(RandomGates):
        def __call__(self, layer_idx, states_BTD, memory):
            self.gates_JBT3.append(weights[layer_idx])
            return weights[layer_idx], memory

    gain_LBTC, _ = marginal_gains(frozen, ids, Same(SPACE, ids, torch.Generator()))
    told_NLC = 100 * centred(gain_LBTC.permute(1, 2, 0, 3).reshape(15, 3, 2))
    with torch.no_grad():
        predictors["l2"].told_NLC.copy_(told_NLC)
        predictors[SHUFFLED].told_NLC.copy_(told_NLC)
    loss, measured = loss_fn(ids, 4, 0)
    control_only = (told_NLC - told_NLC.mean(0)).square().sum(-1).mean()
    assert measured["explained"] == pytest.approx(1, abs=1e-6)
    assert loss > control_only, "the control's labels are those of other tokens"
    asked = predictors["l2"]
    torch.testing.assert_close(asked.states_NF, all_big_states(frozen, ids)[:, :-1].reshape(15, -1))
    assert torch.equal(asked.share_N.view(3, 5), drawn[0].big_B1.expand(3, 5))
    assert torch.equal(asked.big_NL.view(3, 5, 3), torch.stack(weights, dim=-2)[:, :-1, :, Branch.BIG])
    assert torch.equal(predictors[SHUFFLED].share_N.sort().values, asked.share_N.sort().values)
    assert not torch.equal(predictors[SHUFFLED].share_N, asked.share_N)
    assert torch.equal(predictors[SHUFFLED].big_NL.sum(0), asked.big_NL.sum(0))


def test_routes_are_those_of_the_deepest_predictor_but_for_what_is_explored(frozen):
    """A quarter of the choices stay random; the others spend each sequence's own share of big."""
    ids = random_ids(8, 64)
    predictors = torch.nn.ModuleDict({"l2": Told(torch.zeros(504, 3, 2)), SHUFFLED: Told(torch.zeros(504, 3, 2))})
    drawn = []
    original = frozen.forward
    frozen.forward = lambda *arguments, **named: (drawn.append(named.get("policy")), original(*arguments, **named))[1]
    loss_fn = ceiling_loss(frozen, predictors, SPACE, 10, 0, ALONE)
    for step in (0, 9):
        loss_fn(ids, step, 0)
    feature_BTL = all_big_states(frozen, ids)[..., ::16]
    agreed = []
    for gates in drawn:
        rank_BN = feature_BTL.flatten(1).argsort(1, descending=True).argsort(1)
        own_BTL = (rank_BN < gates.big_B1 * rank_BN.shape[1]).view(feature_BTL.shape)
        agreed.append((torch.stack(gates.gates_JBT3, dim=2)[..., Branch.BIG].bool() == own_BTL).float().mean().item())
    by_chance = (drawn[0].big_B1 ** 2 + (1 - drawn[0].big_B1) ** 2).mean().item()
    assert agreed[0] == pytest.approx(by_chance, abs=0.06)
    assert agreed[1] > 0.75


def test_training_lowers_the_loss_of_every_predictor_and_leaves_the_model(frozen, training):
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    predictors = make_predictors(frozen, CONFIG, SPACE, seed=0)
    training(predictors, ceiling_loss(frozen, predictors, SPACE, 8, 0, ALONE), steps=8)
    assert all(torch.equal(value, before[name]) for name, value in frozen.state_dict().items())
    for predictor in predictors.values():
        assert predictor.linear.weight.abs().sum(0).min() > 0, "a feature without gradient"
        assert predictor.outer.weight.abs().sum() > 0
    records = [json.loads(line) for line in (training.run / "metrics.jsonl").read_text().splitlines()]
    assert {"nll", "explained"} <= records[0].keys()
