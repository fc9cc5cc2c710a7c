"""The router of one pattern per sequence: what it sees, when it decides, and what it learns."""

import pytest
import torch

from duollm.config import RouterConfig
from duollm.measure.executor import policy_losses
from duollm.models.branch import Branch
from duollm.routers.registry import load_router, make_router, save_router
from duollm.routers.window import WindowRouter
from duollm.training.loop import Trainer
from duollm.training.optimizer import TrainingPlan
from tiny import random_ids, tiny_model
from tiny_training import ALONE, router_training

SKIP, SMALL, BIG = Branch
LAYERS, PROMPT = 4, 3
PLACES = torch.tensor([1, 2, 4, 8])
PATTERNS = torch.tensor([[2, 2, 1, 1], [2, 1, 2, 1], [2, 1, 1, 2]])


@pytest.fixture
def model():
    return tiny_model(num_hidden_layers=LAYERS).requires_grad_(False)


@pytest.fixture
def router(make_random):
    """Three patterns in use."""
    router = make_random(kind=WindowRouter, num_hidden_layers=LAYERS)
    router.prompt_tokens, router.decide_at = PROMPT, 1
    with torch.no_grad():
        router.routes_RL[:3] = PATTERNS
        router.bias_R[:3], router.bias_R[3:] = 0, -torch.inf
    return router


def naive_pattern(router, model, ids_T):
    """The pattern of one sequence, from a pass of its prompt alone on static."""
    seen = []

    def note(layer, states, memory):
        seen.append(states)
        return PATTERNS[0, layer].expand(states.shape[:2]), None

    model(ids_T[None, :PROMPT], policy=note)
    mean_D = seen[1][0].mean(0)
    return PATTERNS[(router.weight_RD[:3] @ mean_D).argmax()]


def test_the_prompt_runs_static_and_the_rest_one_pattern_that_the_prompt_chose(router, model):
    ids = random_ids(12)
    routes = model(ids, policy=router).routes
    assert (routes[:, :PROMPT] == PATTERNS[0]).all()
    for routes_TL, ids_T in zip(routes, ids, strict=True):
        assert (routes_TL[PROMPT:] == naive_pattern(router, model, ids_T)).all()
    assert len(routes[:, -1].unique(dim=0)) > 1


@pytest.mark.parametrize("first", [1, 2, 3, 5])
def test_a_prompt_may_come_in_parts(router, model, first):
    ids = random_ids(6)
    whole = model(ids, policy=router).routes
    head = model(ids[:, :first], policy=router, use_cache=True)
    tail = model(ids[:, first:], policy=router, past_key_values=head.past_key_values, use_cache=True)
    assert torch.equal(torch.cat([head.routes, tail.routes], dim=1), whole)


def test_a_sequence_whose_start_was_not_seen_runs_static(router, model):
    ids = random_ids(2)
    head = model(ids[:, :5], routes=[2, 2, 2, 2], use_cache=True)
    tail = model(ids[:, 5:], policy=router, past_key_values=head.past_key_values, use_cache=True)
    assert (tail.routes == PATTERNS[0]).all()


def test_a_saved_router_keeps_its_prompt(router, model, tmp_path):
    save_router(router, tmp_path / "saved", {"kind": "window", "branches": ["small", "big"]})
    loaded, _ = load_router(tmp_path / "saved", model.config)
    assert (loaded.prompt_tokens, loaded.decide_at) == (PROMPT, 1)
    assert torch.equal(model(random_ids(), policy=loaded).routes, model(random_ids(), policy=router).routes)


def text(batch, seed):
    """Two domains with words of their own, sequence by sequence in turn."""
    low = random_ids(batch, 8, seed=seed, vocabulary=15)
    return low + 16 * (torch.arange(batch) % 2)[:, None]


def fitted(model, run, seed=0, batch_size=8, steps=24, decide_at=1):
    plan = TrainingPlan(steps=steps, batch_size=batch_size, learning_rate=1.0)
    given = router_training(model, RouterConfig(prompt_tokens=PROMPT, decide_at=decide_at), 0.5, run=run, seed=seed)
    trainer = Trainer("window", plan, lambda step: text(batch_size, step + 1000 * seed).numpy(), ALONE, run, 1.0)
    router = make_router("window", model.config, ["small", "big"]).eval()
    router.fit(type(given)(**(vars(given) | {"trainer": trainer})))
    return router


def test_two_domains_that_want_different_patterns_get_them(monkeypatch, tmp_path):
    """Planted: the first domain loses a nat unless layer 1 is big, the second unless layer 2 is."""

    def planted(self, model, ids_BT, routes_RL, static_L):
        second_B1 = (ids_BT[:, :1] >= 16).long()
        wanted_BR = torch.where(second_B1 == 1, routes_RL[:, 2], routes_RL[:, 1]) == BIG
        noise_BR = torch.randn(wanted_BR.shape, generator=torch.Generator().manual_seed(int(ids_BT.sum())))
        return 3.0 - wanted_BR.float() - 0.01 * (routes_RL[:, 0] == BIG) + 0.1 * noise_BR

    monkeypatch.setattr(WindowRouter, "losses", planted)
    model = tiny_model(num_hidden_layers=LAYERS, hidden_size=48).requires_grad_(False)
    router = fitted(model, tmp_path)
    router.price.fill_(0.5)  # between a layer that a domain needs and one that it does not
    routes_BL = model(text(40, 99), policy=router).routes[:, -1]
    first, second = routes_BL[::2], routes_BL[1::2]
    assert (first[:, 1] == BIG).float().mean() > 0.9
    assert (second[:, 2] == BIG).float().mean() > 0.9
    assert (first[:, 2] == BIG).float().mean() < 0.5


def test_where_nothing_can_be_predicted_it_is_hardly_worse_than_static(model, tmp_path):
    """Random tokens: whatever it takes for a difference between prompts is luck."""
    router = fitted(model, tmp_path)
    ids = text(64, 77)
    nll, routes = policy_losses(model, ids, policy=router)
    static, _ = policy_losses(model, ids, routes=router.routes_RL[0])
    assert ((routes == BIG).sum(-1) >= 1).all()
    assert nll.mean() < static.mean() + 0.05


@pytest.mark.parametrize("seed", range(5))
def test_static_is_the_best_pattern_of_all_text_not_of_the_first_sequences(monkeypatch, tmp_path, seed):
    """Planted: layers 0 and 1 are worth 0.3 nats each, and sequences want other layers by as much."""

    def planted(self, model, ids_BT, routes_RL, static_L):
        noise = torch.randn(len(ids_BT), 1 << LAYERS, generator=torch.Generator().manual_seed(int(ids_BT.sum())))
        return 3.0 - 0.3 * (routes_RL[:, :2] == BIG).sum(-1) + 0.5 * noise[:, ((routes_RL == BIG) * PLACES).sum(-1)]

    monkeypatch.setattr(WindowRouter, "losses", planted)
    model = tiny_model(num_hidden_layers=LAYERS, hidden_size=48).requires_grad_(False)
    router = fitted(model, tmp_path, seed, batch_size=4, steps=100, decide_at=0)
    assert (router.routes_RL[0] == BIG).tolist() == [True, True, False, False]
