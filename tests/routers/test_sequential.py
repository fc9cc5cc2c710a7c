import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from duollm.config import RouterConfig
from duollm.models.branch import Branch
from duollm.routers.base import RouterTraining
from duollm.routers.calibration import ExactBudget
from duollm.routers.registry import load_router, make_router, save_router
from duollm.routers.sequential import RidgeSums, SequentialRouter
from duollm.training.loop import Trainer
from duollm.training.optimizer import TrainingPlan
from tiny import random_ids, tiny_model
from tiny_training import ALONE, batch_at, regression_rows

LAYERS = 5
PLAN = TrainingPlan(steps=8, batch_size=4, learning_rate=1.0, checkpoint_every=3, log_every=8)


@pytest.fixture
def router(make_random):
    return make_random(kind=SequentialRouter, num_hidden_layers=LAYERS)


@pytest.fixture
def model():
    return tiny_model(num_hidden_layers=LAYERS)


def watched_left(router, monkeypatch):
    """What is left of the budget, layer by layer, as the router is told."""
    left, inputs_of = [], router.inputs_of

    def note(layer, states, memory):
        left.append(memory[..., -1] * LAYERS)
        return inputs_of(layer, states, memory)

    monkeypatch.setattr(router, "inputs_of", note)
    return left


@pytest.mark.parametrize("exact", [False, True], ids=["average", "exact"])
def test_it_knows_what_was_really_spent(router, model, monkeypatch, exact):
    """Under an exact budget it is told of the choices that were forced on it."""
    router.set_budget(2)
    left = watched_left(router, monkeypatch)
    routes = model(random_ids(), policy=ExactBudget(router, 3) if exact else router).routes
    spent = (routes == Branch.BIG).float().cumsum(-1)
    for layer in range(1, LAYERS):
        torch.testing.assert_close(left[layer], (3 if exact else 2) - spent[..., layer - 1])


def test_earlier_choices_and_the_budget_change_decisions(router):
    states_BTD = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0))
    start = router.begin(torch.zeros(2, 4))
    small, big = (router.remember(0, torch.full((2, 4), branch), start) for branch in (Branch.SMALL, Branch.BIG))
    poor = router.begin(torch.zeros(2, 4), 1)
    mixed = torch.cat([small[..., :-1], big[..., -1:]], dim=-1)
    scores = [router.scores(1, states_BTD, memory)[0] for memory in (start, poor, big, mixed)]
    for index, one in enumerate(scores):
        assert not any(torch.allclose(one, other) for other in scores[:index])


def test_a_soft_choice_is_remembered_between_the_hard_ones(router):
    start = router.begin(torch.zeros(1, 2))
    for branch in router.branches:
        sure = torch.nn.functional.one_hot(torch.full((1, 2), int(branch)), 3).float()
        hard, soft = (router.remember(1, choice, start) for choice in (torch.full((1, 2), int(branch)), sure))
        torch.testing.assert_close(hard, soft)
    known_BTK = router.remember(1, torch.tensor([0.0, 0.75, 0.25]).expand(1, 2, 3), start)
    torch.testing.assert_close(known_BTK[..., -1], start[..., -1] - 0.25 / LAYERS)
    assert known_BTK[0, 0, :LAYERS].tolist() == [0, 0.25, 0, 0, 0]


def test_a_saved_router_keeps_its_budget(router, model, tmp_path):
    router.set_budget(4)
    save_router(router, tmp_path / "saved", {"kind": "sequential", "branches": ["small", "big"]})
    loaded, _ = load_router(tmp_path / "saved", model.config)
    ids = random_ids()
    before = model(ids, policy=router).routes
    assert torch.equal(model(ids, policy=loaded).routes, before)
    router.set_budget(0)
    assert not torch.equal(model(ids, policy=router).routes, before)


def test_the_inputs_are_the_state_its_random_features_and_what_is_known(router):
    states_BTD, memory = torch.randn(1, 2, 16), router.begin(torch.zeros(1, 2))
    inputs_BTF = router.inputs_of(1, states_BTD, memory)
    features_BTH = torch.einsum("btd,hd->bth", states_BTD, router.random_LHD[1]).clamp(min=0)
    torch.testing.assert_close(inputs_BTF, torch.cat([states_BTD, features_BTH, memory], dim=-1))


def test_flops_are_those_of_the_products(make_random):
    router = make_random(tuple(Branch), kind=SequentialRouter)
    memory = router.begin(torch.zeros(2, 5))
    with FlopCounterMode(display=False) as counter:
        for layer in range(3):
            router.scores(layer, torch.randn(2, 5, 16), memory)
    assert router.flops_per_token() == counter.get_total_flops() / 10


def test_the_fit_from_sums_is_that_of_all_rows_at_once():
    router, sums, input_LNF, target_LNC = regression_rows()
    for step in range(8):
        part = slice(50 * step, 50 * (step + 1))
        sums.add(step, input_LNF[:, part], target_LNC[:, part], ALONE)
    sums.fit(router)
    for layer in range(3):
        x_NF = torch.nn.functional.pad(input_LNF[layer], (0, 1), value=1.0).double()
        held_F = torch.full((x_NF.shape[1],), 1e-6)
        held_F[: sums.held] = sums.penalty
        scale = input_LNF[layer, :, : sums.held].double().square().sum(0).mean()
        rows_FF = (held_F * scale).sqrt().diag().double()  # a ridge is a row of its own for each weight
        stacked = torch.cat([x_NF, rows_FF]), torch.cat([target_LNC[layer].double(), rows_FF.new_zeros(len(held_F), 2)])
        expected_FC = torch.linalg.lstsq(*stacked).solution.float()
        torch.testing.assert_close(router.weight_LCD[layer].T, expected_FC[:-1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(router.bias_LC[layer], expected_FC[-1], rtol=1e-4, atol=1e-5)


def test_the_penalty_is_the_best_for_what_was_left_out():
    """Targets that nothing predicts ask for the largest penalty, those without noise for the smallest."""
    router, _, input_LNF, target_LNC = regression_rows()
    for targets, penalty, explained in ((target_LNC * 0, 0.01, None), (torch.randn(target_LNC.shape), 10.0, 0.1)):
        sums = RidgeSums(router)
        known = (input_LNF @ torch.ones(input_LNF.shape[-1], 2)) if explained is None else targets
        for step in range(8):
            part = slice(50 * step, 50 * (step + 1))
            sums.add(step, input_LNF[:, part], known[:, part], ALONE)
        sums.fit(router)
        assert sums.penalty == penalty
        assert sums.explained > 0.99 if explained is None else sums.explained < explained


def _regress(run, branches=("small", "big"), stop_after=None):
    model = tiny_model().requires_grad_(False)
    router = make_router("sequential", model.config, list(branches))
    seen = 0

    def batches(step):
        nonlocal seen
        seen += 1
        if seen == stop_after:
            raise RuntimeError("killed")
        return batch_at(step)

    trainer = Trainer("tiny", PLAN, batches, ALONE, run, 1.0)
    try:
        router.fit(RouterTraining(model, RouterConfig(), trainer, budget=None, seed=3))
    except RuntimeError:
        assert stop_after
    return router


def test_resumed_equals_uninterrupted(tmp_path):
    whole = _regress(tmp_path / "whole")
    _regress(tmp_path / "parts", stop_after=6)
    resumed = _regress(tmp_path / "parts")
    assert resumed.weight_LCD.equal(whole.weight_LCD)
    assert resumed.bias_LC.equal(whole.bias_LC)
    assert whole.weight_LCD.abs().sum(dim=(1, 2)).min() > 0


@pytest.mark.parametrize("branches", [("skip", "big"), ("skip", "small", "big")])
def test_any_branches_can_be_learnt(tmp_path, branches):
    router = _regress(tmp_path, branches).eval()
    taken = tiny_model()(torch.from_numpy(batch_at(0)), policy=router).routes
    assert set(taken.unique().tolist()) <= {int(Branch[name.upper()]) for name in branches}
