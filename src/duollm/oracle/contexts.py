"""What a token attends to while its routes are compared (docs/oracle.md, "The three contexts").

Each context turns normalised states of all prefixes into attention outputs for one layer.

Shape letters: P prefixes, B sequences, T tokens that are compared, S = tokens up to and including
those, H heads, G key/value heads, d head width, D hidden.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from duollm.models.modeling_duo import DuoAttention, DuoDecoderLayer

Rotary = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class SharedContext:
    """Every token of a sequence takes the same prefix: one ordinary causal pass per prefix.

    Attributes:
        rotary: cosines and sines [B, T, d].
        visible_BTT: which keys each token sees; None when no token is padding.
    """

    rotary: Rotary
    visible_BTT: Tensor | None = None

    def __call__(self, layer: DuoDecoderLayer, states_PND: Tensor) -> Tensor:
        """Attention output [P, N, D], N = B * T."""
        prefixes, _, width = states_PND.shape
        batch, tokens = self.rotary[0].shape[:2]
        rotary = tuple(table.repeat(prefixes, 1, 1) if batch > 1 else table for table in self.rotary)
        query, key, value = layer.self_attn.project(states_PND.view(prefixes * batch, tokens, width), rotary)
        mask = None if self.visible_BTT is None else self.visible_BTT[:, None].repeat(prefixes, 1, 1, 1)
        mixed = scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, scale=layer.self_attn.scaling, enable_gqa=True
        )
        return layer.self_attn.o_proj(mixed.transpose(1, 2).reshape(prefixes, batch * tokens, -1))


@dataclass(frozen=True)
class CachedContext:
    """Earlier tokens are fixed: their keys and values are given; a token adds only its own.

    Serves `reference` (all T tokens of a sequence at once, S = T) and `committed` (one token at a
    time, T = 1). The compared tokens are the last T of the S positions, so the slot of a token's
    own key is the diagonal that ends in the last corner of the [T, S] scores.

    Attributes:
        rotary: cosines and sines [B, T, d] of the compared tokens.
        keys: per layer [B, G, S, d]; the slot of a compared token itself is not read for that token.
        values: likewise.
        hidden_BTS: True where a key must not be seen (later tokens, padding).
    """

    rotary: Rotary
    keys: list[Tensor]
    values: list[Tensor]
    hidden_BTS: Tensor | None = None

    def __call__(self, layer: DuoDecoderLayer, states_PND: Tensor) -> Tensor:
        """Attention output [P, N, D], N = B * T."""
        attention, index = layer.self_attn, layer.layer_idx
        query, key, value = self._project(attention, states_PND)
        groups = attention.num_key_value_groups
        cached_BHSd = self.keys[index].repeat_interleave(groups, dim=1)
        values_BHSd = self.values[index].repeat_interleave(groups, dim=1)
        prefixes, batch, heads, tokens, head_dim = query.shape
        # One product per sequence and head for all prefixes together: [P * T, d] x [d, S].
        rows = query.permute(1, 2, 0, 3, 4).reshape(batch, heads, prefixes * tokens, head_dim) * attention.scaling
        scores = torch.matmul(rows, cached_BHSd.transpose(2, 3)).view(batch, heads, prefixes, tokens, -1)
        if self.hidden_BTS is not None:
            scores.masked_fill_(self.hidden_BTS[:, None, None], -torch.inf)
        own_slot = scores.shape[-1] - tokens
        own = ((query * key).sum(-1) * attention.scaling).permute(1, 2, 0, 3)
        scores.diagonal(own_slot, -2, -1).copy_(own)
        weights = scores.softmax(-1)
        own_weight = weights.diagonal(own_slot, -2, -1).clone()
        weights.diagonal(own_slot, -2, -1).zero_()
        mixed = torch.matmul(weights.view(batch, heads, prefixes * tokens, -1), values_BHSd)
        mixed = mixed.view(batch, heads, prefixes, tokens, head_dim)
        mixed = torch.addcmul(mixed, own_weight[..., None], value.permute(1, 2, 0, 3, 4))
        return attention.o_proj(mixed.permute(2, 0, 3, 1, 4).reshape(prefixes, batch * tokens, -1))

    def _project(self, attention: DuoAttention, states_PND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, own keys and own values, all [P, B, H, T, d]."""
        prefixes, _, width = states_PND.shape
        batch, tokens = self.rotary[0].shape[:2]
        rotary = tuple(table.repeat(prefixes, 1, 1) for table in self.rotary)
        query, key, value = attention.project(states_PND.reshape(prefixes * batch, tokens, width), rotary)
        groups = attention.num_key_value_groups
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        return tuple(each.view(prefixes, batch, *each.shape[1:]) for each in (query, key, value))
