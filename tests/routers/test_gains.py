import pytest
import torch
from torch.nn.functional import cross_entropy

from duollm.routers.marginal import GAIN_SCALE
from duollm.routers.registry import make_router
from tiny import random_ids, tiny_model
from tiny_training import router_training


@pytest.mark.parametrize("branches", [["small", "big"], ["skip", "small", "big"]], ids=["two", "three"])
def test_a_router_that_says_the_gains_has_no_loss(branches, monkeypatch):
    """The naive truth: finite differences of the nll in every gate."""
    model, ids = tiny_model().double(), random_ids(1, 4)
    router = make_router("gains", model.config, branches).double()
    gates = []
    told = []

    def scores(layer, states_BTD, memory):
        told.append(torch.zeros(*states_BTD.shape[:2], len(branches)))
        return told[-1], memory

    monkeypatch.setattr(router, "scores", scores)
    original = model.forward

    def forward(input_ids, policy, use_cache):
        output = original(input_ids, policy=policy, use_cache=use_cache)
        gates.extend(policy.gates_JBT3)
        return output

    monkeypatch.setattr(model, "forward", forward)
    loss, _ = router.loss_fn(router_training(model))(ids, 0, 0)
    monkeypatch.undo()

    def nll(weights):
        logits = model(ids, policy=lambda layer, states, memory: (weights[layer], memory)).logits
        return cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")

    weights = [gate.detach() for gate in gates]
    columns = list(router.branches)
    total, step = 0.0, 2e-3  # the norms compute in float32
    for layer in range(3):
        for token in range(3):
            gains = []
            for column in columns:
                more, less = ([weight.clone() for weight in weights] for _ in range(2))
                more[layer][0, token, column] += step
                less[layer][0, token, column] -= step
                gains.append((nll(less) - nll(more)) / (2 * step) * GAIN_SCALE)
            gains = torch.stack(gains)
            total += (gains - gains.mean()).square().sum()
    assert loss.item() == pytest.approx(total.item() / 9, rel=1e-3)


def test_only_the_router_is_trained(training):
    model = tiny_model().requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    router = make_router("deep-gains", model.config, ["small", "big"])
    training(router, router.loss_fn(router_training(model)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert router.weight_LED[:, :2].abs().sum(dim=(1, 2)).min() > 0, "a layer without gradient"
    assert router.up_LCR.abs().sum(dim=(1, 2)).min() > 0, "a layer without gradient"
