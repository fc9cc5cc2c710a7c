import json
import re

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch import nn

from duollm.models.configuration_duo import DuoConfig
from tiny import tiny_model


def test_heads_default_to_full_attention_of_equal_width():
    config = DuoConfig(hidden_size=48, num_attention_heads=4)
    assert config.attention_shape == (4, 4, 12)
    assert DuoConfig(num_attention_heads=4, num_key_value_heads=2, head_dim=10).attention_shape == (4, 2, 10)


def test_a_saved_configuration_loads_equal(tmp_path):
    config = DuoConfig(
        num_hidden_layers=3, skip_scope="layer", rope_parameters={"rope_type": "default", "rope_theta": 5.0}
    )
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "duo"
    assert DuoConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("num_layers", "did you mean 'num_hidden_layers'"),
        ("small_intermediate", "did you mean 'small_intermediate_size'"),
        ("rms_norm_epsilon", "did you mean 'rms_norm_eps'"),
        ("layer_norm_eps", "did you mean 'rms_norm_eps'"),
        ("n_kv_heads", "allowed: attention_bias, "),
        ("n_head", "allowed: attention_bias, "),
        ("partial_rotary_factor", "allowed: attention_bias, "),
    ],
)
def test_keys_that_would_change_what_is_computed_are_refused(key, expected):
    with pytest.raises(ValueError, match=expected):
        DuoConfig(**{key: 4})


def test_a_switch_that_is_off_changes_nothing_unless_it_says_another_thing():
    assert DuoConfig(use_sliding_window=False, alibi=False).alibi is False
    for sizes in ({"use_sliding_window": False, "sliding_window": 4}, {"do_layer_norm_before": False}):
        with pytest.raises(ValueError, match=f"no key '{next(iter(sizes))}'"):
            DuoConfig(**sizes)


OTHERS = {
    "pad_token": "<pad>",
    "use_qk_norm": False,
    "tokenizer_class": "GPT2Tokenizer",
    "unsloth_version": "2025.1",
    "max_length": 20,
    "torchscript": False,
    "decoder_start_token_id": 3,
    "batch_norm_eps": 1.0,
    "is_causal": False,
    "n_layer": None,
    "step": 7,
    "quantization_config": {"quant_method": "torchao", "quant_type": "int8"},
}


def test_keys_that_tools_write_pass_and_are_written_back(tmp_path):
    file = tmp_path / "config.json"
    DuoConfig(num_hidden_layers=2).save_pretrained(tmp_path)
    file.write_text(json.dumps(json.loads(file.read_text()) | OTHERS))
    config = DuoConfig.from_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    assert OTHERS.items() <= json.loads(file.read_text()).items()
    assert DuoConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_an_attribute_set_on_a_configuration_is_saved_and_loads(tmp_path):
    config = DuoConfig()
    config.my_note = {"by": "me"}
    config.save_pretrained(tmp_path)
    assert DuoConfig.from_pretrained(tmp_path).my_note == {"by": "me"}


def test_fewer_layers_are_the_first_and_more_are_refused(tmp_path):
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    DuoConfig(num_hidden_layers=3, layer_types=kinds, sliding_window=4).save_pretrained(tmp_path)
    assert DuoConfig.from_pretrained(tmp_path, num_hidden_layers=2).layer_types == kinds[:2]
    with pytest.raises(ValueError, match="layer_types must be 4 times one of"):
        DuoConfig.from_pretrained(tmp_path, num_hidden_layers=4)


@pytest.mark.parametrize("sizes", [{}, {"qk_norm": True}, {"gated_ffn": False}], ids=str)
def test_the_plans_name_every_part_that_is_split(sizes):
    model = tiny_model(**sizes)
    assert model.supports_tp_plan
    parts = {re.sub(r"\.\d+\.", ".*.", name) for name, _ in model.named_modules()}
    linear = {re.sub(r"\.\d+\.", ".*.", name) for name, each in model.named_modules() if isinstance(each, nn.Linear)}
    assert linear - {"lm_head"} <= model.tp_plan.keys() <= parts
    assert model.pp_plan.keys() - {"lm_head"} == {"model.embed_tokens", "model.layers", "model.norm"}
    assert not any("plan" in key for key in model.config.to_dict())


@pytest.mark.parametrize(
    "values",
    [{"num_hidden_layers": "12"}, {"hidden_size": 128.0}, {"skip_scope": "attention"}, {"tie_word_embeddings": "no"}],
)
def test_wrong_types_are_refused(values):
    with pytest.raises(StrictDataclassFieldValidationError, match=next(iter(values))):
        DuoConfig(**values)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"hidden_size": 100, "num_attention_heads": 3}, r"num_attention_heads \(3\) must divide hidden_size \(100\)"),
        (
            {"num_attention_heads": 4, "num_key_value_heads": 3},
            r"num_key_value_heads \(3\) must divide num_attention_heads \(4\)",
        ),
        ({"hidden_size": 6, "num_attention_heads": 2}, r"head_dim \(3\) must be even"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, got 0"),
        ({"small_intermediate_size": -1}, "small_intermediate_size must be at least 1, got -1"),
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1, got 0"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be at least 1, got 0"),
        ({"sliding_window": 0}, "sliding_window to be at least 1, got 0"),
        ({"num_hidden_layers": 2, "layer_types": ["full_attention"]}, "layer_types must be 2 times one of full_att"),
        ({"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}, "sliding_window to be at least 1, got None"),
        ({"rope_parameters": {"rope_type": "axial"}}, "rope_type 'axial' is not supported; supported are default"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, expected):
    with pytest.raises(ValueError, match=expected):
        DuoConfig(**sizes)
