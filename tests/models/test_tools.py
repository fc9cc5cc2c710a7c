"""What people put around a model works with the duo, on mixed routes as on any: each tool beside the plain model."""

import re

import pytest
import torch
from torch import nn
from transformers import MODEL_MAPPING, AutoModelForCausalLM, pipeline

from duollm import DuoConfig, DuoForCausalLM, RouteSpace, search_oracle
from duollm.data.tokenizer import load_tokenizer
from duollm.models.policy import FixedRoutes
from tiny import random_ids, random_routes, tiny_model
from tiny_saved import save_tiny

IDS, ROUTES = random_ids(), random_routes()
GENERATE = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def fused_products(monkeypatch):
    """Fused products also in a model as small as this."""
    monkeypatch.setattr("duollm.models.ffn._WORTHWHILE", 0)


@torch.no_grad()
def logits_of(model):
    return model(input_ids=IDS, routes=ROUTES).logits


@torch.no_grad()
def computed_densely(model):
    return model(input_ids=IDS, routes=ROUTES, execution="reference").logits


TARGETS = {
    "the defaults": None,
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "both FFNs": ["gate_proj", "up_proj", "down_proj"],
    "small FFNs": r".*\.mlp\.small\.(gate|up|down)_proj",
    "big FFNs": r".*\.mlp\.big\.(gate|up|down)_proj",
    "every linear map": "all-linear",
}


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_peft_adapters_train_and_merge(targets):
    peft = pytest.importorskip("peft", reason="needs the extra `compat`")
    config = peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(tiny_model(), config)
    before = logits_of(adapted)
    torch.testing.assert_close(before, logits_of(tiny_model()), atol=1e-5, rtol=0)
    optimizer = torch.optim.SGD([weight for weight in adapted.parameters() if weight.requires_grad], lr=1.0)
    for _ in range(2):  # half of an adapter begins at zero, so the first step leaves the other half without gradient
        adapted(input_ids=IDS, labels=IDS, routes=ROUTES).loss.backward()
        optimizer.step()
    touched = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert all("lora_" in name for name in touched)
    if isinstance(targets, str) and targets != "all-linear":
        assert all(re.search(targets.split("(")[0], name) for name in touched)
    adapted.eval()
    trained = logits_of(adapted)
    assert not torch.allclose(trained, before, atol=1e-3)
    torch.testing.assert_close(trained, computed_densely(adapted), atol=1e-4, rtol=0)
    generated = adapted.generate(input_ids=IDS, **GENERATE)
    found = search_oracle(adapted.get_base_model(), IDS, RouteSpace(3)).nll
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits_of(merged), trained, atol=1e-4, rtol=0)
    assert merged.generate(IDS, **GENERATE).equal(generated)
    torch.testing.assert_close(search_oracle(merged, IDS, RouteSpace(3)).nll, found, atol=1e-4, rtol=0)


def test_a_search_refuses_a_head_with_an_adapter():
    peft = pytest.importorskip("peft", reason="needs the extra `compat`")
    adapted = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match=r"lm_head must be an nn\.Linear .*; merge adapters"):
        search_oracle(adapted.get_base_model(), IDS, RouteSpace(3))


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_accelerate_offloads_weights(where, tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="needs the extra `compat`")
    expected, generated = logits_of(tiny_model()), tiny_model().generate(IDS, **GENERATE)
    if where == "cpu":
        model = accelerate.cpu_offload(tiny_model(), torch.device("cpu"))
    else:
        model = accelerate.disk_offload(tiny_model(), str(tmp_path), torch.device("cpu"))
    assert model.model.layers[0].mlp.big.up_proj.weight.is_meta
    torch.testing.assert_close(logits_of(model), expected, atol=1e-5, rtol=0)
    assert model.generate(IDS, **GENERATE).equal(generated)
    with pytest.raises(ValueError, match=r"weights in memory .* do not offload"):
        search_oracle(model, IDS, RouteSpace(3))


def test_a_device_map_may_leave_layers_on_disk(tmp_path):
    pytest.importorskip("accelerate", reason="needs the extra `compat`")
    model = tiny_model()
    model.save_pretrained(tmp_path / "duo")
    places = {"model.layers.1": "disk", "model.layers.2": "disk"}
    places |= dict.fromkeys(
        ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"], "cpu"
    )
    loaded = DuoForCausalLM.from_pretrained(
        tmp_path / "duo", device_map=places, offload_folder=tmp_path / "offloaded", attn_implementation="eager"
    ).eval()
    assert loaded.model.layers[1].mlp.big.up_proj.weight.is_meta
    torch.testing.assert_close(logits_of(loaded), logits_of(model), atol=1e-5, rtol=0)


def assert_quantised(model, spread):
    """It still computes nearly the same, and what its own modules compute."""
    plain, quantised = logits_of(tiny_model()), logits_of(model)
    assert not torch.allclose(quantised, plain, atol=1e-3)
    assert (quantised - plain).std() < spread * plain.std()
    assert model.generate(IDS, **GENERATE).shape == (2, 14)


def test_dynamic_quantisation():
    pytest.importorskip("torch.ao.quantization", reason="gone from newer versions of torch")
    model = torch.ao.quantization.quantize_dynamic(tiny_model(), {nn.Linear}, dtype=torch.qint8)
    assert_quantised(model, 0.1)


@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_torchao_quantises(kind):
    quantization = pytest.importorskip("torchao.quantization", reason="needs the extra `compat`")
    model = tiny_model()
    quantization.quantize_(model, getattr(quantization, kind)())
    assert_quantised(model, 0.1)
    torch.testing.assert_close(logits_of(model), computed_densely(model), atol=1e-4, rtol=0)


def test_a_search_takes_quantised_layers_but_for_the_head():
    quantization = pytest.importorskip("torchao.quantization", reason="needs the extra `compat`")
    model = tiny_model()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match=r"not quantised, got Linear with .*leave lm_head out of quantisation"):
        search_oracle(model, IDS, RouteSpace(3))
    model = tiny_model()
    quantization.quantize_(model.model, quantization.Int8WeightOnlyConfig())
    found = search_oracle(model, IDS, RouteSpace(3), big_layers=[3])
    with torch.no_grad():
        log_p_BTV = model(input_ids=IDS).logits.log_softmax(-1)
    expected_BT = -log_p_BTV[:, :-1].gather(-1, IDS[:, 1:, None])[..., 0]
    torch.testing.assert_close(found.nll[0], expected_BT, atol=1e-4, rtol=0)


def test_text_generation_pipeline(tmp_path):
    save_tiny(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = load_tokenizer(tmp_path / "model")
    model.attach(FixedRoutes(torch.tensor([1, 2, 1])))
    prompts = ["the owl", "a mat on the cat"]
    made = pipeline("text-generation", model=model, tokenizer=tokenizer)(
        prompts, batch_size=2, return_full_text=False, **GENERATE
    )
    for prompt, [answer] in zip(prompts, made, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        expected = model.generate(ids, routes=[1, 2, 1], **GENERATE)[0, ids.shape[1] :]
        assert answer["generated_text"] == tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.skipif(DuoConfig not in MODEL_MAPPING, reason="AutoModel does not know the duo")
def test_feature_extraction_pipeline(tmp_path):
    model, _ = save_tiny(tmp_path)
    [features] = pipeline("feature-extraction", model=str(tmp_path / "model"))("the owl")
    ids = load_tokenizer(tmp_path / "model")("the owl", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model.model(ids).last_hidden_state[0]
    torch.testing.assert_close(torch.tensor(features), expected, atol=1e-4, rtol=0)
