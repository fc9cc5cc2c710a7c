"""Toy models of every dense family that a duo can be made from, and of the options that change what they compute."""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

_SIZES = {
    "vocab_size": 31,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_ROTARY = _SIZES | {"intermediate_size": 24, "num_key_value_heads": 2, "initializer_range": 0.3}
_OPT = _SIZES | {"ffn_dim": 24, "init_std": 0.3, "dropout": 0.1}
_MIXED = ["full_attention", "sliding_attention", "full_attention"]


def _rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, "factor": 4.0, **values}}


_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8}

FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_ROTARY),
    "mistral": MistralConfig(**_ROTARY, sliding_window=4),
    "qwen2": Qwen2Config(**_ROTARY),
    "qwen3": Qwen3Config(**_ROTARY, head_dim=6),
    "opt": OPTConfig(**_OPT),
}
"""One toy per family."""

VARIANTS: dict[str, PreTrainedConfig] = FAMILIES | {
    "llama-biases": LlamaConfig(**_ROTARY, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama-wide-heads": LlamaConfig(**_ROTARY, head_dim=10, rms_norm_eps=1e-3, hidden_act="gelu"),
    "llama-old-rope": LlamaConfig.from_dict(
        _ROTARY | {"rope_theta": 300.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    ),
    "llama-linear": LlamaConfig(**_ROTARY, **_rope("linear")),
    "llama-dynamic": LlamaConfig(**(_ROTARY | {"max_position_embeddings": 8}), **_rope("dynamic")),
    "llama-llama3": LlamaConfig(**_ROTARY, **_rope("llama3", **_LLAMA3)),
    "llama-yarn": LlamaConfig(**_ROTARY, **_rope("yarn", original_max_position_embeddings=8)),
    "llama-longrope": LlamaConfig(
        **_ROTARY,
        **_rope("longrope", short_factor=[1.0, 1.5], long_factor=[2.0, 3.0], original_max_position_embeddings=8),
    ),
    "mistral-full": MistralConfig(**_ROTARY, sliding_window=None, head_dim=6),
    "qwen2-tied": Qwen2Config(**_ROTARY, tie_word_embeddings=True),
    "qwen2-sliding": Qwen2Config(**_ROTARY, use_sliding_window=True, sliding_window=3, max_window_layers=1),
    "qwen3-sliding": Qwen3Config(
        **_ROTARY, use_sliding_window=True, sliding_window=3, layer_types=_MIXED, attention_bias=True
    ),
    "qwen3-yarn": Qwen3Config(**_ROTARY, **_rope("yarn", original_max_position_embeddings=8)),
    "opt-untied": OPTConfig(**_OPT, tie_word_embeddings=False),
    "opt-no-biases": OPTConfig(**_OPT, enable_bias=False, activation_function="gelu"),
}
"""Options that change what a family computes."""


def dense_model(config: PreTrainedConfig, attention: str = "eager", seed: int = 0) -> PreTrainedModel:
    """A random dense model in evaluation mode; every weight matters, biases and norms too."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(deepcopy(config), attn_implementation=attention)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.uniform_(-0.5, 0.5)
    return model.eval()


def left_padded(ids_BT: Tensor, padding: int = 4) -> Tensor:
    """An attention mask [B, T] whose first row begins with padding."""
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, :padding] = 0
    return mask_BT
