"""The dense model families that a duo can be made from, with the names of their configuration keys and weights.

Nothing of a dense configuration is dropped silently. Each key is mapped to a field of `DuoConfig`, or must have the
value at which it has no effect, or is known to have none. Every other key is refused by name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig
from transformers.activations import ACT2FN

from .branch import Branch
from .configuration_duo import DuoConfig


@dataclass(frozen=True)
class Family:
    """One dense architecture.

    Attributes:
        fields: for each configuration key of the dense model, the `DuoConfig` fields that carry it.
        fixed: `DuoConfig` fields that hold for every member of the family.
        neutral: keys that are supported only at this value.
        derived: keys whose value must follow from other fields, and how, the same in both configurations.
        weights: parts of weight names in the dense model and their replacements in the duo, applied in order.
    """

    fields: Mapping[str, tuple[str, ...]]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    neutral: Mapping[str, Any] = field(default_factory=dict)
    derived: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=lambda: {".mlp.": ".mlp.big."})


def _same(names: str) -> dict[str, tuple[str, ...]]:
    return {name: (name,) for name in names.split()}


_COMMON = _same(
    "vocab_size hidden_size num_hidden_layers num_attention_heads max_position_embeddings attention_dropout "
    "use_cache pad_token_id bos_token_id eos_token_id tie_word_embeddings is_causal"
)
_ROTARY = _COMMON | _same(
    "intermediate_size num_key_value_heads hidden_act initializer_range rms_norm_eps rope_parameters"
)

_QWEN_WINDOW: dict[str, Callable[[Any], Any]] = {
    "use_sliding_window": lambda config: config.sliding_window is not None,
}

FAMILIES: dict[str, Family] = {
    "llama": Family(_ROTARY | _same("head_dim attention_bias mlp_bias")),
    "mistral": Family(_ROTARY | _same("head_dim sliding_window")),
    "qwen2": Family(_ROTARY | _same("sliding_window layer_types"), fixed={"qkv_bias": True}, derived=_QWEN_WINDOW),
    "qwen3": Family(
        _ROTARY | _same("head_dim attention_bias sliding_window layer_types"),
        fixed={"qk_norm": True},
        derived=_QWEN_WINDOW,
    ),
    "opt": Family(
        _COMMON
        | {
            "ffn_dim": ("intermediate_size",),
            "activation_function": ("hidden_act",),
            "init_std": ("initializer_range",),
            "dropout": ("hidden_dropout",),
            "enable_bias": ("attention_bias", "mlp_bias"),
        },
        # transformers' OPT has no key for the epsilon: it is that of torch's LayerNorm.
        fixed={"norm": "layer", "positions": "learned", "gated_ffn": False, "rms_norm_eps": 1e-5},
        neutral={
            "do_layer_norm_before": True,
            "_remove_final_layer_norm": False,
            "layer_norm_elementwise_affine": True,
            "layerdrop": 0.0,
        },
        derived={"word_embed_proj_dim": lambda config: config.hidden_size},
        weights={
            "decoder.final_layer_norm.": "norm.",
            "decoder.": "",
            ".self_attn_layer_norm.": ".input_layernorm.",
            ".final_layer_norm.": ".post_attention_layernorm.",
            ".out_proj.": ".o_proj.",
            ".fc1.": ".mlp.big.up_proj.",
            ".fc2.": ".mlp.big.down_proj.",
        },
    ),
}
"""Supported families by the `model_type` of their configuration."""

_LARGEST_SIZE = 10**9

# Keys that say nothing about what the model computes.
_WITHOUT_EFFECT = (
    {"pretraining_tp", "transformers.js_config", "is_llama_config", "prefix", "task_specific_params"}
    | {"max_window_layers"}  # transformers has worked out layer_types from it
    | PreTrainedConfig().to_dict().keys()
    | GenerationConfig().to_dict().keys()
)


def family_of(model_type: str | None) -> Family:
    """Look up a family.

    Raises:
        ValueError: the family is not supported. The message lists the supported ones.
    """
    if model_type == DuoConfig.model_type:
        raise ValueError("this is a duo already; load it with DuoForCausalLM.from_pretrained")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"model type {model_type!r} is not supported; supported are {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def duo_config(dense: PreTrainedConfig, small_intermediate_size: int, skip_scope: str) -> DuoConfig:
    """Turn the configuration of a dense model into that of a duo.

    Raises:
        ValueError: a key has an effect that the duo does not reproduce.
    """
    family = family_of(dense.model_type)
    found: dict[str, Any] = dict(family.fixed)
    for key, value in dense.to_dict().items():
        if key in family.fields:
            found |= dict.fromkeys(family.fields[key], value)
        else:
            _check_without_effect(dense, family, key, value)
    for dropout in found.keys() & {"attention_dropout", "hidden_dropout"}:
        found[dropout] = float(found[dropout] or 0)  # integers and None there
    found |= {"small_intermediate_size": small_intermediate_size, "skip_scope": skip_scope}
    _check_values(found)
    try:
        return DuoConfig(**found, dense_family=dense.model_type)
    except (StrictDataclassError, KeyError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def _check_values(found: Mapping[str, Any]) -> None:
    """Refuse values with which no model can be built, or only one that computes NaN."""
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings"):
        if not 1 <= found[name] <= _LARGEST_SIZE:
            raise ValueError(f"{name} must be from 1 to {_LARGEST_SIZE:,}, got {found[name]}")
    if found["hidden_act"] not in ACT2FN:
        raise ValueError(f"hidden_act {found['hidden_act']!r} is not known; known are {', '.join(sorted(ACT2FN))}")
    if not 0 <= found.get("rms_norm_eps", 0.0) < float("inf"):
        raise ValueError(f"rms_norm_eps must not be below 0, nor infinite, got {found['rms_norm_eps']}")
    for dropout in ("attention_dropout", "hidden_dropout"):
        if not 0 <= found.get(dropout, 0.0) < 1:
            raise ValueError(f"{dropout} must be at least 0 and below 1, got {found[dropout]}")
    padding, vocabulary = found["pad_token_id"], found["vocab_size"]
    if padding is not None and not -vocabulary <= padding < vocabulary:
        raise ValueError(f"pad_token_id {padding} is not a token; there are {vocabulary}")
    rope = found.get("rope_parameters") or {}
    for name in ("rope_theta", "factor", "original_max_position_embeddings"):
        value = rope.get(name, 1)
        if value is not None and not (isinstance(value, int | float) and value > 0):
            raise ValueError(f"{name} of the rotary embedding must be a number above 0, got {value!r}")


def _check_without_effect(dense: PreTrainedConfig, family: Family, key: str, value: Any) -> None:
    """Refuse a key that no field carries, unless its value changes nothing."""
    refused = f"{dense.model_type} with {key}={value!r} is not supported"
    if key in family.neutral or key in family.derived:
        only = family.neutral[key] if key in family.neutral else family.derived[key](dense)
        if value != only:
            raise ValueError(f"{refused}, only {key}={only!r}")
    elif value not in (None, False, {}, []) and key not in _WITHOUT_EFFECT:
        raise ValueError(f"{refused}; if it does not change what the model computes, delete it from config.json")


def dense_config(duo: DuoConfig, branch: Branch) -> PreTrainedConfig:
    """Return the configuration of the dense model that the duo is when all layers take one branch.

    Raises:
        ValueError: no dense model of the duo's family has this configuration.
    """
    family = family_of(duo.dense_family)
    wanted = {name: getattr(duo, name) for name in DuoConfig.__annotations__}
    wanted["intermediate_size"] = duo.small_intermediate_size if branch == Branch.SMALL else duo.intermediate_size
    wanted["small_linear"] = duo.small_linear and branch == Branch.SMALL
    if hasattr(duo, "is_causal"):  # no field: a configuration has it only where it was set
        wanted["is_causal"] = duo.is_causal
    given = {key: wanted[names[0]] for key, names in family.fields.items() if names[0] in wanted}
    given |= {**family.neutral, **{key: follow(duo) for key, follow in family.derived.items()}}
    dense = CONFIG_MAPPING[duo.dense_family](**given)
    back = duo_config(dense, duo.small_intermediate_size, duo.skip_scope)
    for name, value in wanted.items():
        if getattr(back, name) != value:
            raise ValueError(f"a {duo.dense_family} model cannot have {name}={value!r}, only {getattr(back, name)!r}")
    return dense


def duo_name(family: Family, dense_name: str) -> str:
    """Return the name in the duo of a dense model's weight; the dense FFN is the big one."""
    for dense_part, duo_part in family.weights.items():
        dense_name = dense_name.replace(dense_part, duo_part)
    return dense_name
