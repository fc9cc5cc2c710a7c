"""What a token attends to while its routes are compared (docs/oracle.md, "The three contexts").

Each context turns normalised states of all prefixes into attention outputs for one layer.

Shape letters: P prefixes, B sequences, T tokens that are compared, S = tokens up to and including
those, H heads, G key/value heads, d head width, D hidden.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers.cache_utils import Cache

from duollm.models.attention import DuoAttention, Rotary
from duollm.models.modeling_duo import DuoDecoderLayer

Masks = Mapping[int | None, Tensor | None]
"""A mask for each width of attention window that the layers have (None: unlimited); None masks nothing."""


@dataclass(frozen=True)
class SharedContext:
    """Every token of a sequence takes the same prefix: one ordinary causal pass per prefix.

    Attributes:
        rotary: cosines and sines [B, T, d]; None without rotary positions.
        tokens: T.
        visible: which keys each token sees, [B, T, T]; None means all up to its own.
    """

    rotary: Rotary | None
    tokens: int
    visible: Masks

    def __call__(self, layer: DuoDecoderLayer, states_PND: Tensor) -> Tensor:
        """Attention output [P, N, D], N = B * T."""
        attention, visible_BTT = layer.self_attn, self.visible[layer.self_attn.sliding_window]
        prefixes, rows, width = states_PND.shape
        query, key, value = attention.project(
            states_PND.view(-1, self.tokens, width), repeat_rotary(self.rotary, prefixes)
        )
        mask = None if visible_BTT is None else visible_BTT[:, None].repeat(prefixes, 1, 1, 1)
        mixed = scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, scale=attention.scaling, enable_gqa=True
        )
        return attention.o_proj(mixed.transpose(1, 2).reshape(prefixes, rows, -1))


@dataclass(frozen=True)
class CachedContext:
    """Earlier tokens are fixed: their keys and values are given; a token adds only its own.

    Serves `reference` (all T tokens of a sequence at once, S = T) and `committed` (one token at a
    time, T = 1). The compared tokens are the last T of the S positions, so a token's own slot lies on
    the diagonal that ends in the last corner of the [T, S] scores.

    Attributes:
        rotary: cosines and sines [B, T, d] of the compared tokens; None without rotary positions.
        tokens: T.
        keys: per layer [B, H, S, d]; a compared token's own slot is replaced by its own key.
        values: likewise.
        hidden: True where a key must not be seen (later tokens, padding), [B, T, S]; None if all are seen.
    """

    rotary: Rotary | None
    tokens: int
    keys: list[Tensor]
    values: list[Tensor]
    hidden: Masks

    @classmethod
    def over(
        cls, cache: Cache, groups: int, rotary: Rotary | None, tokens: int, hidden: Masks, free_slots: int = 0
    ) -> Self:
        """Read a filled cache; `groups` query heads share a key head; add empty slots at the end."""

        def prepared(cached_BGSd: Tensor) -> Tensor:
            return pad(cached_BGSd.repeat_interleave(groups, dim=1), (0, 0, 0, free_slots))

        layers: list[Any] = cache.layers
        keys, values = [prepared(layer.keys) for layer in layers], [prepared(layer.values) for layer in layers]
        return cls(rotary, tokens, keys, values, hidden)

    def __call__(self, layer: DuoDecoderLayer, states_PND: Tensor) -> Tensor:
        """Attention output [P, N, D], N = B * T."""
        attention, keys_BHSd = layer.self_attn, self.keys[layer.layer_idx]
        query, key, value = self._project(attention, states_PND)
        batch, heads, prefixes, tokens, head_dim = query.shape
        # One product per sequence and head for all prefixes together: [P * T, d] x [d, S].
        rows = query.flatten(2, 3) * attention.scaling
        scores = torch.matmul(rows, keys_BHSd.transpose(2, 3)).view(batch, heads, prefixes, tokens, -1)
        hidden_BTS = self.hidden[attention.sliding_window]
        if hidden_BTS is not None:
            scores.masked_fill_(hidden_BTS[:, None, None], -torch.inf)
        own_slot = scores.shape[-1] - tokens
        scores.diagonal(own_slot, -2, -1).copy_((query * key).sum(-1) * attention.scaling)
        weights = scores.softmax(-1)
        own_weight = weights.diagonal(own_slot, -2, -1).clone()
        weights.diagonal(own_slot, -2, -1).zero_()
        mixed = torch.matmul(weights.flatten(2, 3), self.values[layer.layer_idx]).view_as(query)
        mixed = torch.addcmul(mixed, own_weight[..., None], value)
        return attention.o_proj(mixed.permute(2, 0, 3, 1, 4).reshape(prefixes, batch * tokens, heads * head_dim))

    def _project(self, attention: DuoAttention, states_PND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, own keys and own values, all [B, H, P, T, d]."""
        prefixes, rows, width = states_PND.shape
        rotary, batch = repeat_rotary(self.rotary, prefixes), rows // self.tokens
        projected = attention.project(states_PND.reshape(prefixes * batch, self.tokens, width), rotary)
        groups = attention.num_key_value_groups
        query, key, value = (each.view(prefixes, batch, *each.shape[1:]).permute(1, 2, 0, 3, 4) for each in projected)
        return query, key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)


def repeat_rotary(rotary: Rotary | None, prefixes: int) -> Rotary | None:
    """Rotary tables [B, T, d] for prefixes x sequences; one sequence broadcasts."""
    if rotary is None:
        return None
    cos, sin = rotary
    return (cos, sin) if len(cos) == 1 else (cos.repeat(prefixes, 1, 1), sin.repeat(prefixes, 1, 1))
