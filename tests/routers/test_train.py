import json

import pytest
import torch

from duollm.config import DataConfig, RouterConfig
from duollm.convert.saving import load_model
from duollm.data.packing import prepare_data
from duollm.models.branch import Branch
from duollm.routers.registry import load_router
from duollm.routers.train import router_name, train_router, trainings
from duollm.training.loop import Context
from tiny import tiny_model
from tiny_corpus import write_corpus
from tiny_training import ALONE

CONFIG = RouterConfig(tokens=16 * 8 * 10, batch_size=8, precision="fp32", temperatures=(2.0, 0.5), budget_weight=3.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    corpus = write_corpus(folder / "owls", documents=120)
    config = DataConfig(domains=[str(corpus)], vocab_size=300, sequence_length=16, validation_share=0.2)
    return prepare_data(config, seed=0, folder=folder / "data")


def test_a_trained_router_is_calibrated_and_loadable(tmp_path, data):
    model = tiny_model(vocab_size=data.vocab_size)
    train_router(Context(tmp_path, data, 0, ALONE), model, CONFIG, "linear", [1], 1)
    router, facts = load_router(tmp_path / "routers" / "linear_k1", model.config)
    assert {key: facts[key] for key in ("kind", "branches", "big_layers")} == {
        "kind": "linear",
        "branches": ["small", "big"],
        "big_layers": 1,
    }
    assert facts["budget"] == pytest.approx(1 / 3)
    assert facts["price"] == pytest.approx(router.price.item())
    sample = data.balanced_sample("validation", 20, 1, seed=0)  # a quarter of the 80 sequences of training
    assert len(sample) == 20
    routes = model(torch.from_numpy(sample), policy=router).routes
    assert (routes == Branch.BIG).double().mean().item() == pytest.approx(facts["calibrated_share"], abs=1e-6)
    assert facts["calibrated_share"] == pytest.approx(1 / 3, abs=0.02)
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [10]
    assert not list(tmp_path.glob("resume/*"))


def test_one_training_may_serve_every_budget(tmp_path, data):
    model = tiny_model(vocab_size=data.vocab_size)
    train_router(Context(tmp_path, data, 0, ALONE), model, CONFIG, "gains", [1, 2], 1)
    (one, first), (two, second) = (load_router(tmp_path / "routers" / f"gains_k{k}", model.config) for k in (1, 2))
    assert one.weight_LCD.equal(two.weight_LCD)
    assert first["calibrated_share"] < second["calibrated_share"]
    assert first["price"] > second["price"]
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [10, 20, 30, 40]  # four times as many as for one budget


def test_a_model_trained_with_its_router_is_saved_beside_it(tmp_path, data):
    config = CONFIG.model_copy(update={"train_backbone": True, "learning_rate": 1e-3})
    model = tiny_model(vocab_size=data.vocab_size)
    before = model.model.embed_tokens.weight.detach().clone()
    train_router(Context(tmp_path, data, 0, ALONE), model, config, "linear", [1], 1)
    together = load_model(tmp_path / "routers" / "linear_k1" / "model")
    assert together.model.embed_tokens.weight.equal(model.model.embed_tokens.weight)
    assert not together.model.embed_tokens.weight.equal(before)


def test_a_kind_is_trained_per_budget_or_once_for_all():
    assert router_name("linear", 4) == "linear_k4"
    assert trainings(RouterConfig(kinds=["linear", "gains"], big_layers=[1, 2])) == [
        ("linear_k1", "linear", [1]),
        ("linear_k2", "linear", [2]),
        ("gains", "gains", [1, 2]),
    ]


@pytest.mark.parametrize("kind", ["gumbel", "sequential"])
def test_what_a_training_draws_depends_on_its_seed_alone(tmp_path, data, kind):
    found = []
    for noise in range(2):
        torch.manual_seed(noise)
        model, run = tiny_model(vocab_size=data.vocab_size), tmp_path / str(noise)
        torch.manual_seed(noise)
        train_router(Context(run, data, 0, ALONE), model, CONFIG, kind, [1], 1)
        found.append(load_router(run / "routers" / f"{kind}_k1", model.config)[0].state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
