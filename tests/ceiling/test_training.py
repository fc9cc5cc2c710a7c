import json

import pytest
import torch

from duollm.ceiling.predictor import all_big_states, make_predictors
from duollm.ceiling.training import ceiling_loss
from duollm.config import CeilingConfig
from duollm.models.branch import Branch
from duollm.records.keys import SHUFFLED
from duollm.routers.marginal import RandomGates, centred, marginal_gains
from tiny import random_ids, tiny_model
from tiny_training import ALONE

BRANCHES = (Branch.SMALL, Branch.BIG)
CONFIG = CeilingConfig(depths=[0, 2], width=8)


class Told(torch.nn.Module):
    """Stands in for a predictor: says what it is told, and keeps what it was asked; routes by the first feature."""

    shape_LC = (3, 2)

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
    loss_fn = ceiling_loss(frozen, predictors, BRANCHES, 8, loss_seed, ALONE)
    loss_fn(ids, 4, 0)
    weights = [gate.detach().requires_grad_() for gate in drawn[0].gates_LBT3]

    class Same(RandomGates):
        def __call__(self, layer_idx, states_BTD, memory):
            self.gates_LBT3.append(weights[layer_idx])
            return weights[layer_idx], memory

    gain_LBTC, _ = marginal_gains(frozen, ids, Same(BRANCHES, ids, torch.Generator()))
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
    loss_fn = ceiling_loss(frozen, predictors, BRANCHES, 10, 0, ALONE)
    for step in (0, 9):
        loss_fn(ids, step, 0)
    feature_BTL = all_big_states(frozen, ids)[..., ::16]
    agreed = []
    for gates in drawn:
        rank_BN = feature_BTL.flatten(1).argsort(1, descending=True).argsort(1)
        own_BTL = (rank_BN < gates.big_B1 * rank_BN.shape[1]).view(feature_BTL.shape)
        agreed.append((torch.stack(gates.gates_LBT3, dim=2)[..., Branch.BIG].bool() == own_BTL).float().mean().item())
    by_chance = (drawn[0].big_B1 ** 2 + (1 - drawn[0].big_B1) ** 2).mean().item()
    assert agreed[0] == pytest.approx(by_chance, abs=0.06)
    assert agreed[1] > 0.75


def test_training_lowers_the_loss_of_every_predictor_and_leaves_the_model(frozen, training):
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    predictors = make_predictors(frozen, CONFIG, BRANCHES, seed=0)
    training(predictors, ceiling_loss(frozen, predictors, BRANCHES, 8, 0, ALONE), steps=8)
    assert all(torch.equal(value, before[name]) for name, value in frozen.state_dict().items())
    for predictor in predictors.values():
        assert predictor.linear.weight.abs().sum(0).min() > 0, "a feature without gradient"
        assert predictor.outer.weight.abs().sum() > 0
    records = [json.loads(line) for line in (training.run / "metrics.jsonl").read_text().splitlines()]
    assert {"nll", "explained"} <= records[0].keys()
