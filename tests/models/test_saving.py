import json

import pytest
import torch
from safetensors.torch import load_file

from duollm.models.branch import Branch
from duollm.models.modeling_duo import DuoForCausalLM
from tiny import random_ids, tiny_model
from without_duollm import run_without_duollm


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_loads_bit_for_bit(tmp_path, tied):
    model, ids = tiny_model(tie_word_embeddings=tied), random_ids()
    model.save_pretrained(tmp_path)
    loaded = DuoForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    routes = [int(Branch.SMALL)] * 3
    assert torch.equal(loaded(ids, routes=routes).logits, model(ids, routes=routes).logits)


def test_weights_have_the_names_of_llama(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    ffn = {f"mlp.{branch}.{part}_proj" for branch in ("small", "big") for part in ("gate", "up", "down")}
    layer = ffn | {f"self_attn.{part}_proj" for part in "qkvo"} | {"input_layernorm", "post_attention_layernorm"}
    of_layers = {f"model.layers.{index}.{part}.weight" for index in range(3) for part in layer}
    assert names == of_layers | {"model.embed_tokens.weight", "model.norm.weight"}


LOAD = """
import json, torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
report = {}
for folder in ("mine", "edited"):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, attn_implementation="eager")
    report[folder] = type(model).__doc__.splitlines()[0]
    if folder == "mine":
        ids = torch.arange(18).view(2, 9)
        routes = (ids[..., None] + torch.arange(3)) % 3
        report["base"] = type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__
        report["config"] = type(AutoConfig.from_pretrained(folder, trust_remote_code=True)).__module__
        report["logits"] = model(ids, routes=routes).logits.tolist()
        report["generated"] = model.generate(ids, routes=torch.tensor([1, 0, 2]), max_new_tokens=4).tolist()
        model.save_pretrained("again")
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def sent(tmp_path_factory):
    """What a process without duollm made of two saved models."""
    folder = tmp_path_factory.mktemp("sent")
    tiny_model().save_pretrained(folder / "mine")
    tiny_model(seed=1).save_pretrained(folder / "edited")
    code = folder / "edited" / "modeling_duo.py"
    code.write_text(code.read_text().replace("The duo language model with its head", "An edited model"))
    return json.loads(run_without_duollm(LOAD, folder, folder / "cache")) | {"folder": folder}


def test_without_duollm_a_saved_model_gives_equal_logits_under_routes(sent):
    ids = torch.arange(18).view(2, 9)
    expected = tiny_model()(ids, routes=(ids[..., None] + torch.arange(3)) % 3).logits
    torch.testing.assert_close(torch.tensor(sent["logits"]), expected, atol=1e-5, rtol=1e-5)


def test_without_duollm_a_saved_model_generates_the_same(sent):
    ids = torch.arange(18).view(2, 9)
    expected = tiny_model().generate(ids, routes=torch.tensor([1, 0, 2]), max_new_tokens=4)
    assert sent["generated"] == expected.tolist()


def test_each_folder_is_loaded_with_its_own_code(sent):
    assert sent["config"].startswith("transformers_modules.mine.")
    assert sent["base"] == "DuoModel"
    assert sent["mine"].startswith("The duo language model")
    assert sent["edited"].startswith("An edited model")


def test_the_code_goes_along_when_it_is_saved_again(sent):
    mine, again = (
        {path.name: path.read_bytes() for path in (sent["folder"] / name).glob("*.py")} for name in ("mine", "again")
    )
    assert mine == again
    assert {"modeling_duo.py", "configuration_duo.py", "branch.py", "dispatch.py", "conversion.py"} <= mine.keys()
