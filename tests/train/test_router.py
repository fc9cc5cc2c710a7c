import json

import pytest
import torch

from duollm.config import DataConfig, RouterConfig
from duollm.data.packing import prepare_data
from duollm.evaluate.loading import load_model
from duollm.models.branch import Branch
from duollm.routing.folder import load_router, make_router
from duollm.routing.linear import budget_loss
from duollm.train.router import router_name, soft_routing_loss, train_router
from tiny import random_ids, tiny_model
from tiny_corpus import write_corpus
from tiny_training import ALONE

CONFIG = RouterConfig(tokens=16 * 8 * 10, batch_size=8, precision="fp32", temperatures=(2.0, 0.5), budget_weight=3.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    corpus = write_corpus(folder / "owls")
    config = DataConfig(domains=[str(corpus)], vocab_size=300, sequence_length=16, validation_share=0.2)
    return prepare_data(config, seed=0, folder=folder / "data")


def test_only_the_router_is_trained(training):
    model = tiny_model().requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    router = make_router("linear", model.config, ["small", "big"])
    training(router, soft_routing_loss(model, router, 1 / 3, CONFIG, steps=6))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert router.weight_LCD.abs().sum(dim=(1, 2)).min() > 0, "a layer without gradient"
    assert router.bias_LC.abs().min() > 0


def test_the_loss_is_nll_plus_weighted_budget_loss():
    model, ids = tiny_model(), random_ids()
    router = make_router("linear", model.config, ["small", "big"])
    torch.nn.init.normal_(router.weight_LCD)
    loss, measured = soft_routing_loss(model, router, 0.2, CONFIG, steps=5)(ids, 2, 0)
    router.temperature = 1.0  # halfway from 2 to 0.5 on a geometric path
    output = model(ids, labels=ids, policy=router.train())
    torch.testing.assert_close(loss, output.loss + 3 * budget_loss(output.choices, 0.2))
    share = torch.stack([weights[..., Branch.BIG] for weights in output.choices]).mean()
    assert measured == pytest.approx({"nll": output.loss.item(), "big_share": share.item(), "temperature": 1.0})


def test_the_temperature_falls_geometrically():
    model, ids = tiny_model(), random_ids()
    router = make_router("linear", model.config, ["small", "big"])
    loss_fn = soft_routing_loss(model, router, 0.5, CONFIG, steps=5)
    got = [loss_fn(ids, step, 0)[1]["temperature"] for step in range(5)]
    assert got == pytest.approx([2, 2**0.5, 1, 2**-0.5, 0.5])
    assert soft_routing_loss(model, router, 0.5, CONFIG, steps=1)(ids, 0, 0)[1]["temperature"] == 2


def test_a_trained_router_is_calibrated_and_loadable(tmp_path, data):
    model = tiny_model(vocab_size=data.vocab_size)
    train_router(model, CONFIG, 1, data, seed=0, world=ALONE, run=tmp_path)
    router, facts = load_router(tmp_path / "routers" / "linear_k1", model.config)
    assert {key: facts[key] for key in ("kind", "branches", "big_layers")} == {
        "kind": "linear",
        "branches": ["small", "big"],
        "big_layers": 1,
    }
    assert facts["budget"] == pytest.approx(1 / 3)
    assert facts["threshold"] == pytest.approx(router.threshold.item())
    batches = [torch.from_numpy(data.train_batch(step, 8, seed=0, split="validation")) for step in range(8)]
    routes = torch.cat([model(batch, policy=router).routes for batch in batches])
    assert (routes == Branch.BIG).double().mean().item() == pytest.approx(facts["calibrated_share"], abs=1e-6)
    assert facts["calibrated_share"] == pytest.approx(1 / 3, abs=0.02)
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [10]
    assert not list(tmp_path.glob("resume/*"))


def test_a_model_trained_with_its_router_is_saved_beside_it(tmp_path, data):
    config = CONFIG.model_copy(update={"train_backbone": True, "learning_rate": 1e-3})
    model = tiny_model(vocab_size=data.vocab_size)
    before = model.model.embed_tokens.weight.detach().clone()
    train_router(model, config, 1, data, seed=0, world=ALONE, run=tmp_path)
    together = load_model(tmp_path / "routers" / "linear_k1" / "model")
    assert together.model.embed_tokens.weight.equal(model.model.embed_tokens.weight)
    assert not together.model.embed_tokens.weight.equal(before)


def test_the_name_says_kind_and_budget():
    assert router_name("linear", 4) == "linear_k4"
