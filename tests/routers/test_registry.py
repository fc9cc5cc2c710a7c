import json

import pytest
import torch

from duollm.errors import UserError
from duollm.routers.registry import load_router, make_router, save_router
from tiny import random_ids, tiny_model

FACTS = {"kind": "linear", "branches": ["small", "big"], "budget": 0.25}


@pytest.fixture
def saved(tmp_path, make_router):
    router = make_router()
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


def test_saving_again_replaces_the_folder(saved, make_router):
    folder, _ = saved
    (folder / "stray.txt").touch()
    other = make_router(seed=1)
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
