"""The dense model families that a duo can be made from: how their configurations and weights are named there.

Nothing of a dense configuration is dropped silently: each key is mapped to a field of `DuoConfig`, or must
have the value at which it has no effect, or is known to have none; everything else is refused by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from .configuration_duo import DuoConfig


@dataclass(frozen=True)
class Family:
    """One dense architecture.

    Attributes:
        fields: for each configuration key of the dense model the `DuoConfig` fields that carry it.
        fixed: `DuoConfig` fields that hold for every member of the family.
        neutral: keys that are supported only at this value.
        weights: parts of weight names there, and what stands for them in the duo; applied in order.
    """

    fields: Mapping[str, tuple[str, ...]]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    neutral: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=lambda: {".mlp.": ".mlp.big."})


def _same(names: str) -> dict[str, tuple[str, ...]]:
    return {name: (name,) for name in names.split()}


_COMMON = _same(
    "vocab_size hidden_size num_hidden_layers num_attention_heads max_position_embeddings attention_dropout "
    "use_cache pad_token_id bos_token_id eos_token_id tie_word_embeddings"
)
_ROTARY = _COMMON | _same(
    "intermediate_size num_key_value_heads hidden_act initializer_range rms_norm_eps rope_parameters"
)

FAMILIES: dict[str, Family] = {
    "llama": Family(_ROTARY | _same("head_dim attention_bias mlp_bias")),
}
"""Supported families by the `model_type` of their configuration."""

# Keys that say nothing about what the model computes.
_WITHOUT_EFFECT = (
    {"pretraining_tp", "transformers.js_config", "is_llama_config", "prefix", "task_specific_params"}
    | PreTrainedConfig().to_dict().keys()
    | GenerationConfig().to_dict().keys()
)


def family_of(model_type: str | None) -> Family:
    """Look up a family.

    Raises:
        ValueError: it is not supported; the message lists those that are.
    """
    if model_type not in FAMILIES:
        raise ValueError(f"model type {model_type!r} is not supported; supported are {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def duo_fields(dense: PreTrainedConfig) -> dict[str, Any]:
    """Return the `DuoConfig` fields of a dense configuration, the duo's own ones not included.

    Raises:
        ValueError: a key has an effect that the duo does not reproduce.
    """
    family, found = family_of(dense.model_type), dict(family_of(dense.model_type).fixed)
    for key, value in dense.to_dict().items():
        if key in family.fields:
            found |= dict.fromkeys(family.fields[key], value)
        elif key in family.neutral:
            if value != family.neutral[key]:
                raise ValueError(
                    f"{dense.model_type} with {key}={value!r} is not supported, only {key}={family.neutral[key]!r}"
                )
        elif value not in (None, False, {}, []) and key not in _WITHOUT_EFFECT:
            raise ValueError(
                f"{dense.model_type} with {key}={value!r} is not supported; "
                "if that does not change what the model computes, delete it from config.json"
            )
    found["attention_dropout"] = float(found["attention_dropout"] or 0)
    return found


def duo_config(dense: PreTrainedConfig, **own: Any) -> DuoConfig:
    """Turn a dense configuration into a duo's; `own` are the fields that only a duo has."""
    return DuoConfig(**duo_fields(dense), **own)


def duo_name(family: Family, dense_name: str) -> str:
    """The duo's name of a weight of the dense model; its FFN is the big one."""
    for dense_part, duo_part in family.weights.items():
        dense_name = dense_name.replace(dense_part, duo_part)
    return dense_name
