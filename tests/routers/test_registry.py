import json

import pytest
import torch

from duollm.config import RouterConfig
from duollm.errors import UserError
from duollm.routers.registry import ROUTERS, check_kinds, load_router, make_router, save_router, settings_of
from duollm.routes.space import RouteSpace
from tiny import random_ids, tiny_model
from tiny_labels import made_up_labels
from tiny_training import router_training

FACTS = {"kind": "linear", "branches": ["small", "big"], "budget": 0.25}


@pytest.fixture
def saved(tmp_path, make_random):
    router = make_random()
    router.price.fill_(0.7)
    save_router(router, tmp_path / "linear_k1", FACTS)
    return tmp_path / "linear_k1", router


def test_a_saved_router_chooses_as_before(saved):
    folder, router = saved
    model, ids = tiny_model(), random_ids()
    loaded, facts = load_router(folder, model.config)
    assert facts == FACTS
    assert not loaded.training
    assert loaded.price.item() == pytest.approx(0.7)
    assert torch.equal(model(ids, policy=loaded).routes, model(ids, policy=router).routes)


def test_saving_again_replaces_the_folder(saved, make_random):
    folder, _ = saved
    (folder / "stray.txt").touch()
    other = make_random(seed=1)
    save_router(other, folder, FACTS)
    loaded, _ = load_router(folder, tiny_model().config)
    assert torch.equal(loaded.weight_LCD, other.weight_LCD)
    assert {path.name for path in folder.iterdir()} == {"router.safetensors", "router.json"}


@pytest.mark.parametrize("name", ["router.safetensors", "router.json"])
def test_a_missing_file_is_named(saved, name):
    (saved[0] / name).unlink()
    with pytest.raises(UserError, match=rf"not a router folder .*{name}.*duollm train-router"):
        load_router(saved[0], tiny_model().config)


@pytest.mark.parametrize("length", [0, 5, -20])
@pytest.mark.parametrize("name", ["router.safetensors", "router.json"])
def test_a_truncated_file_is_refused(saved, name, length):
    path = saved[0] / name
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match="linear_k1: not a router folder"):
        load_router(saved[0], tiny_model().config)


@pytest.mark.parametrize("content", [[], {"kind": "linear"}, {"kind": "linear", "branches": ["tiny", "big"]}])
def test_facts_that_say_too_little_are_refused(saved, content):
    (saved[0] / "router.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="linear_k1: not a router folder"):
        load_router(saved[0], tiny_model().config)


@pytest.mark.parametrize("sizes", [{"num_hidden_layers": 4}, {"hidden_size": 32}])
def test_a_router_for_another_model_is_refused(saved, sizes):
    with pytest.raises(UserError, match="other sizes"):
        load_router(saved[0], tiny_model(**sizes).config)


def test_an_unknown_kind_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"unknown router 'liner'; did you mean 'linear'\? allowed: .*linear"):
        make_router("liner", tiny_model().config, ["small", "big"])


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"kinds": ["liner"]}, "kinds: unknown router 'liner'; did you mean 'linear'"),
        (
            {"kinds": ["linear", "early-exit"], "branches": ["skip", "small", "big"]},
            "kinds: early-exit chooses between two branches; branches holds skip, small, big",
        ),
        (
            {"kinds": ["gumbel", "gains"], "train_backbone": True},
            "training gains leaves the model as it is; choose among linear, gumbel, distilled, mixture-of-depths",
        ),
        (
            {"kinds": ["distilled"], "train_backbone": True, "distilled_share": 1},
            "training distilled leaves the model as it is",
        ),
        ({"kinds": ["window"], "prompt_tokens": 1024}, r"^prompt_tokens \(1024\) must leave two of the 1025 tokens"),
        ({"kinds": ["window"], "tokens": 4000}, r"^tokens \(4000\): window is cross-fitted over 4 sequences"),
        (
            {"kinds": ["gains"], "around_static": True, "branches": ["skip", "small", "big"]},
            r"^around_static: gains is then held to two branches",
        ),
        (
            {"kinds": ["codebook"]},
            r"^label_tokens \(1024\): codebook and knn are cross-fitted over windows; give at least 1025",
        ),
    ],
    ids=["unknown", "three branches", "backbone", "only imitation", "prompt", "text", "static", "one window"],
)
def test_what_cannot_be_trained_is_refused_beforehand(settings, complaint):
    check_kinds(RouterConfig(kinds=["linear", "early-exit", "codebook"]), 1024)
    check_kinds(RouterConfig(kinds=["linear", "distilled"], train_backbone=True), 16)
    with pytest.raises(UserError, match=complaint):
        check_kinds(RouterConfig(**settings), 1025)


def test_a_training_depends_on_what_its_kind_reads_and_not_on_what_only_others_do():
    changed = {"budget_weight": 1.0, "decide_at": 1, "learning_rate": 0.5, "kinds": ["gains"]}
    told = {}
    for key, value in changed.items():
        one, other = RouterConfig(), RouterConfig(**{key: value})
        told[key] = {kind for kind in ROUTERS if settings_of(kind, one) != settings_of(kind, other)}
    assert told == {
        "budget_weight": {"linear", "gumbel", "distilled"},
        "decide_at": {"codebook", "knn", "window"},
        "learning_rate": set(ROUTERS),
        "kinds": set(),
    }


@pytest.mark.parametrize("kind", ROUTERS)
def test_a_kind_names_all_settings_that_it_reads(kind, tmp_path):
    """A stale router would stay if one were missing."""
    read = set()

    class Watched:
        def __getattr__(self, name):
            read.add(name)
            return getattr(config, name)

    config, model = RouterConfig(decide_at=1, prompt_tokens=3), tiny_model()
    labels = made_up_labels(RouteSpace(3)) if ROUTERS[kind].needs_labels else None
    given = router_training(model, Watched(), 1 / 3, steps=2, labels=labels, run=tmp_path)
    make_router(kind, model.config, ["small", "big"]).fit(given)
    assert read <= set(settings_of(kind, config))
    assert set(ROUTERS[kind].settings) <= set(RouterConfig.model_fields)
