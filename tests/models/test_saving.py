import pytest
import torch
from safetensors.torch import load_file

from duollm.models.branch import Branch
from duollm.models.modeling_duo import DuoForCausalLM
from tiny import random_ids, tiny_model


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
