"""Grouped-query attention, as in Llama, and the norms of the dense families.

Shape letters: B batch, T tokens, D hidden, H heads, d width of a head.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

from .compat import CACHE, compute_dtype, update_cache
from .configuration_duo import DuoConfig

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines [1 or B, T, d] of the positions."""


def eager_attention_forward(
    module: "DuoAttention",
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention as three plain operations, [B, H, T, d] -> [B, T, H, d].

    On CPUs its backward is faster than the fused kernel's for short sequences.
    """
    key = repeat_kv(key, module.num_key_value_groups)
    value = repeat_kv(value, module.num_key_value_groups)
    scores = torch.matmul(query * scaling, key.transpose(2, 3))
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2), weights


def attention_function(config: DuoConfig) -> Callable[..., Any]:
    """The function that the configuration names, transformers' own or one that was registered there."""
    return ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager_attention_forward)


class DuoAttention(nn.Module):
    """Grouped-query attention, as in Llama."""

    def __init__(self, config: DuoConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        heads, key_value_heads, self.head_dim = config.attention_shape
        self.num_key_value_groups = heads // key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.sliding_window = config.windows[layer_idx]
        width, bias = config.hidden_size, config.attention_bias or config.qkv_bias
        self.q_proj = nn.Linear(width, heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * self.head_dim, width, bias=config.attention_bias)
        self.q_norm = DuoRMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = DuoRMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def project(self, states_BTD: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [B, H, T, d], keys and values [B, H_kv, T, d], normalised and rotated as configured."""
        shape = (*states_BTD.shape[:-1], -1, self.head_dim)
        query = self.q_proj(states_BTD).view(shape).transpose(1, 2)
        key = self.k_proj(states_BTD).view(shape).transpose(1, 2)
        value = self.v_proj(states_BTD).view(shape).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if rotary is not None:
            cos, sin = rotary
            if cos.dtype != query.dtype:
                cos, sin = cos.to(query.dtype), sin.to(query.dtype)
            query, key = apply_rotary_pos_emb(query, key, cos, sin)
        return query, key, value

    def forward(
        self,
        states_BTD: Tensor,
        position_embeddings: Rotary | None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attention output [B, T, D] and, where the implementation has them, its weights.

        Keywords other than the cache go to the attention function. Flash attention learns from `position_ids`
        where a packed row's texts begin.
        """
        query, key, value = self.project(states_BTD, position_embeddings)
        cache = kwargs.pop(CACHE, None)
        if cache is not None:
            key, value = update_cache(cache, key, value, self.layer_idx, kwargs)
        dropout = self.config.attention_dropout if self.training else 0.0
        settings = {"dropout": dropout, "scaling": self.scaling, "sliding_window": self.sliding_window}
        attend = attention_function(self.config)
        mixed, weights = attend(self, query, key, value, attention_mask, **settings, **kwargs)
        return self.o_proj(mixed.reshape(*states_BTD.shape[:-1], -1)), weights


def make_norm(config: DuoConfig) -> nn.Module:
    """A norm over the hidden size, of the configured kind."""
    if config.norm == "layer":
        return nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps)
    return DuoRMSNorm(config.hidden_size, config.rms_norm_eps)


class DuoRMSNorm(nn.Module):
    """Root mean square normalisation (Zhang & Sennrich, 2019), computed in float32."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, states: Tensor) -> Tensor:
        """Normalise the last dimension."""
        weight, wanted = self.weight, compute_dtype(states)
        if states.dtype == weight.dtype:  # torch widens bf16 inside
            normed = nn.functional.rms_norm(states, weight.shape, weight, self.eps)
        else:
            normed = nn.functional.rms_norm(states.float(), weight.shape, weight.float(), self.eps)
        return normed if normed.dtype == wanted else normed.to(wanted)
