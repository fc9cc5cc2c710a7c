import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from duollm.models.branch import Branch
from duollm.routers.exact import ExactBudget
from duollm.routers.registry import load_router, save_router
from duollm.routers.sequential import SequentialRouter
from tiny import random_ids, tiny_model

LAYERS = 5


@pytest.fixture
def router(make_router):
    return make_router(kind=SequentialRouter, num_hidden_layers=LAYERS)


@pytest.fixture
def model():
    return tiny_model(num_hidden_layers=LAYERS)


def watched_left(router, monkeypatch):
    """What is left of the budget, layer by layer, as the router is told."""
    left, informed = [], router.informed

    def note(layer, states, memory):
        left.append(memory[..., -1] * LAYERS)
        return informed(layer, states, memory)

    monkeypatch.setattr(router, "informed", note)
    return left


@pytest.mark.parametrize("exact", [False, True], ids=["average", "exact"])
def test_it_knows_what_was_really_spent(router, model, monkeypatch, exact):
    """Under an exact budget it is told of the choices that were forced on it."""
    router.aim(2)
    left = watched_left(router, monkeypatch)
    routes = model(random_ids(), policy=ExactBudget(router, 3) if exact else router).routes
    spent = (routes == Branch.BIG).float().cumsum(-1)
    for layer in range(1, LAYERS):
        torch.testing.assert_close(left[layer], (3 if exact else 2) - spent[..., layer - 1])


def test_earlier_choices_and_the_budget_change_decisions(router):
    states_BTD = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0))
    start = router.begin(torch.zeros(2, 4))
    small, big = (router.remember(0, torch.full((2, 4), branch), start) for branch in (Branch.SMALL, Branch.BIG))
    poor = router.hold(start, 1)
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
    router.aim(4)
    save_router(router, tmp_path / "saved", {"kind": "sequential", "branches": ["small", "big"]})
    loaded, _ = load_router(tmp_path / "saved", model.config)
    ids = random_ids()
    before = model(ids, policy=router).routes
    assert torch.equal(model(ids, policy=loaded).routes, before)
    router.aim(0)
    assert not torch.equal(model(ids, policy=router).routes, before)


def test_the_inputs_are_the_state_its_random_features_and_what_is_known(router):
    states_BTD, memory = torch.randn(1, 2, 16), router.begin(torch.zeros(1, 2))
    inputs_BTF = router.informed(1, states_BTD, memory)
    features_BTH = torch.einsum("btd,hd->bth", states_BTD, router.random_LHD[1]).clamp(min=0)
    torch.testing.assert_close(inputs_BTF, torch.cat([states_BTD, features_BTH, memory], dim=-1))


def test_flops_are_those_of_the_products(make_router):
    router = make_router(tuple(Branch), kind=SequentialRouter)
    memory = router.begin(torch.zeros(2, 5))
    with FlopCounterMode(display=False) as counter:
        for layer in range(3):
            router.scores(layer, torch.randn(2, 5, 16), memory)
    assert router.flops_per_token() == counter.get_total_flops() / 10
