"""A batch of text prepared for search, and what its tokens attend to (docs/oracle.md, "The three contexts").

`Batch` holds the text. Each context turns normalised states of all prefixes into attention outputs for one layer.

Shape letters: P prefixes, B sequences, T tokens that are compared, N = B * T, S = tokens up to and including
those, H heads, G key/value heads, d head width, L layers, D hidden.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers.cache_utils import Cache, DynamicCache

from duollm.models.attention import DuoAttention, Rotary
from duollm.models.branch import Branch
from duollm.models.modeling_duo import DuoDecoderLayer, DuoForCausalLM
from duollm.models.policy import FixedRoutes, check_routes
from duollm.routes.space import RouteSpace

CONTEXTS = ("shared", "reference", "committed")

Attend = Callable[[DuoDecoderLayer, Tensor], Tensor]
"""Attention output [P, N, D] of one layer for normalised states [P, N, D]."""

Masks = Mapping[int | None, Tensor | None]
"""A mask for each width of attention window that the layers have (None: unlimited); None masks nothing."""


@dataclass(frozen=True)
class SharedContext:
    """Every token of a sequence takes the same prefix: one ordinary causal pass per prefix.

    Attributes:
        rotary: cosines and sines [B, T, d]; None without rotary positions.
        tokens: T.
        visible: the keys that each token sees, [B, T, T]; None means all up to its own.
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
    """Earlier tokens have given keys and values. A compared token adds only its own.

    This serves context `reference` (all T tokens of a sequence at once, S = T) and `committed` (one token at a time,
    T = 1). The compared tokens are the last T of the S positions. So a token's own slot lies on the diagonal that ends
    in the last corner of the [T, S] scores.

    Attributes:
        rotary: cosines and sines [B, T, d] of the compared tokens; None without rotary positions.
        tokens: T.
        keys: per layer [B, H, S, d]; a compared token's own slot is replaced by its own key.
        values: per layer [B, H, S, d], in the same way.
        hidden: True where a key must not be seen (later tokens, padding), [B, T, S]; None if all keys are seen.
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
        """Read a filled cache and add empty slots at the end. `groups` query heads share a key head."""

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
    """Repeat rotary tables [B, T, d] for all prefixes; those of one sequence broadcast."""
    if rotary is None:
        return None
    cos, sin = rotary
    return (cos, sin) if len(cos) == 1 else (cos.repeat(prefixes, 1, 1), sin.repeat(prefixes, 1, 1))


@dataclass
class Batch:
    """Token ids [B, T] to be searched. The last token is only a label.

    Attributes:
        ids_BT: the tokens that predict, [B, T - 1].
        labels_N: the tokens that they predict.
        padding_BT: True where a prediction does not count, [B, T - 1].
        hidden_BTD: embeddings of the tokens that predict, as they enter the first layer.
    """

    model: DuoForCausalLM
    input_ids: Tensor
    attention_mask: Tensor | None = None
    ids_BT: Tensor = field(init=False)
    labels_N: Tensor = field(init=False)
    padding_BT: Tensor = field(init=False)
    hidden_BTD: Tensor = field(init=False)

    def __post_init__(self) -> None:
        given_BT = self.input_ids.new_ones(self.input_ids.shape) if self.attention_mask is None else self.attention_mask
        self.ids_BT, self.labels_N = self.input_ids[:, :-1], self.input_ids[:, 1:].flatten()
        self._mask_BT = given_BT[:, :-1].bool()
        self.padding_BT = ~(self._mask_BT & given_BT[:, 1:].bool())
        self._positions_BT = (self._mask_BT.long().cumsum(-1) - 1).clamp(min=0)
        embedded_BTD = self.model.model.embed_tokens(self.ids_BT)
        self.hidden_BTD, self._rotary = self.model.model.place(embedded_BTD, self._positions_BT)

    @cached_property
    def label_ND(self) -> Tensor:
        """The embeddings of the labels in the head."""
        return self.model.lm_head.weight[self.labels_N]

    def states(self) -> Tensor:
        """Return the normalised final states of the predicting tokens with all layers big, [N, D]."""
        return self._forward(None, None).flatten(0, 1)

    def shared_context(self) -> SharedContext:
        """Return the context in which every token attends to tokens on the same route."""
        plain = bool(self._mask_BT.all())
        visible: Masks = {
            window: None if plain and window is None else self._visible(window) for window in self._windows
        }
        return SharedContext(self._rotary, self.ids_BT.shape[1], visible)

    def reference_context(self, reference: Tensor | None) -> CachedContext:
        """Return the context in which earlier tokens take reference routes, [L] or [B, T, L]; default all big."""
        layers = self.model.config.num_hidden_layers
        given = torch.full((layers,), int(Branch.BIG)) if reference is None else reference
        routes = check_routes(given, len(self.input_ids), self.input_ids.shape[1], layers).to(self.input_ids.device)
        cache = DynamicCache()  # unlike the model's own, it keeps what has left a sliding window
        self._forward(routes if routes.ndim == 1 else routes[:, :-1], cache)
        hidden: Masks = {window: ~self._visible(window) for window in self._windows}
        return CachedContext.over(cache, self._groups, self._rotary, self.ids_BT.shape[1], hidden)

    def step_context(self, cache: DynamicCache, position: int) -> CachedContext:
        """Return the context in which tokens at `position` attend to a cache of the earlier ones."""
        here = slice(position, position + 1)
        rotary = None if self._rotary is None else (self._rotary[0][:, here], self._rotary[1][:, here])
        plain = bool(self._mask_BT.all())
        hidden: Masks = {
            window: None
            if plain and (window is None or position < window)
            else ~self._visible(window)[:, here, : position + 1]
            for window in self._windows
        }
        if position == 0:
            config = self.model.config
            heads, _, width = config.attention_shape
            layers = [self.hidden_BTD.new_zeros(len(self.ids_BT), heads, 1, width)] * config.num_hidden_layers
            return CachedContext(rotary, 1, layers, layers, hidden)
        return CachedContext.over(cache, self._groups, rotary, 1, hidden, free_slots=1)

    def commit(self, cache: DynamicCache, position: int, routes_BL: Tensor) -> None:
        """Run the tokens at `position` on their routes, so that the cache holds them."""
        self.model.model(
            input_ids=self.ids_BT[:, position : position + 1],
            attention_mask=self._given_mask(position + 1),
            position_ids=self._positions_BT[:, position : position + 1],
            past_key_values=cache,
            use_cache=True,
            policy=FixedRoutes(routes_BL[:, None]),
        )

    def as_routes(self, space: RouteSpace, route_ids_BT: Tensor) -> Tensor:
        """Turn route ids of the predicting tokens into routes [B, T, L] of all tokens. The last token takes all big."""
        routes_BTL = torch.full((*self.input_ids.shape, space.num_layers), int(Branch.BIG))
        routes_BTL = routes_BTL.to(self.input_ids.device)
        routes_BTL[:, :-1] = space.decode(route_ids_BT.clamp(min=0))
        return routes_BTL

    def _forward(self, routes: Tensor | None, cache: DynamicCache | None) -> Tensor:
        return self.model.model(
            input_ids=self.ids_BT,
            attention_mask=self._given_mask(self.ids_BT.shape[1]),
            position_ids=self._positions_BT,
            past_key_values=cache,
            use_cache=cache is not None,
            policy=None if routes is None else FixedRoutes(routes),
        ).last_hidden_state

    def _given_mask(self, length: int) -> Tensor | None:
        return None if self._mask_BT.all() else self._mask_BT[:, :length].long()

    def _visible(self, window: int | None) -> Tensor:
        """Which keys each token sees, [B, T - 1, T - 1]; padding sees itself, so that its row holds numbers."""
        length, device = self.ids_BT.shape[1], self.ids_BT.device
        causal_TT = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        if window is not None:
            causal_TT = causal_TT.triu(1 - window)
        own_TT = torch.eye(length, dtype=torch.bool, device=device)
        return causal_TT & self._mask_BT[:, None] | own_TT

    @property
    def _windows(self) -> set[int | None]:
        """The widths of attention window among the layers."""
        return set(self.model.config.windows)

    @property
    def _groups(self) -> int:
        heads, key_value_heads, _ = self.model.config.attention_shape
        return heads // key_value_heads
