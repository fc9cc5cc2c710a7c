import json

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError

from duollm.models.configuration_duo import DuoConfig


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
        ("num_layers", "num_layers"),
        ("small_intermediate", "did you mean 'small_intermediate_size'"),
        ("xyz", "allowed"),
    ],
)
def test_unknown_keys_are_refused(key, expected):
    with pytest.raises(ValueError, match=expected):
        DuoConfig(**{key: 4})


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
