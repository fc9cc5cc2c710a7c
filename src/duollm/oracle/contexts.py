"""A batch of text prepared for search, and what its tokens attend to (docs/oracle.md, "The three contexts").

`Batch` holds the text. Each context turns normalised states of all prefixes into attention outputs for one layer.

Shape letters: P prefixes, B sequences, T tokens that are compared, N = B * T, S = tokens up to and including
those, H heads, G key/value heads, d head width, L layers, D hidden, X = P * B, Y = X * G.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import DynamicCache

from duollm.models.modeling_duo import DuoDecoderLayer, DuoForCausalLM
from duollm.models.policy import FixedRoutes, check_routes
from duollm.oracle.projections import Projections

CONTEXTS = ("shared", "reference", "committed")

Attend = Callable[[DuoDecoderLayer, Tensor], Tensor]
"""Attention output [P, N, D] of one layer for normalised states [P, N, D]."""

Masks = Mapping[int | None, Tensor | None]
"""A mask for each width of attention window that the layers have (None: unlimited); None masks nothing."""

_BLOCK = 64  # queries that attend together; a smaller block sees fewer keys in vain, but its products are slower
_SHORT = 256  # tokens, above which torch's attention is as fast


@dataclass(frozen=True)
class SharedContext:
    """Every token of a sequence takes the same prefix: one ordinary causal pass per prefix.

    Attributes:
        project: makes queries, keys and values.
        tokens: T.
        visible: the keys that each token sees, [B, T, T]; None means all up to its own.
    """

    project: Projections
    tokens: int
    visible: Masks

    def __call__(self, layer: DuoDecoderLayer, states_PND: Tensor) -> Tensor:
        """Attention output [P, N, D], N = B * T."""
        attention, visible_BTT = layer.self_attn, self.visible[layer.self_attn.sliding_window]
        projected = self.project(attention, states_PND, self.tokens)
        query, key, value = (each.flatten(0, 1).transpose(1, 2) for each in projected)
        plain = visible_BTT is None and key.device.type == "cpu" and key.dtype == torch.float32
        if plain and self.tokens <= _SHORT:
            mixed = _causal_attention(query, key, value)
        else:
            mask = None if visible_BTT is None else visible_BTT[:, None].repeat(len(states_PND), 1, 1, 1)
            mixed = scaled_dot_product_attention(
                query, key, value, mask, is_causal=mask is None, scale=1.0, enable_gqa=True
            )
        return attention.o_proj(mixed.transpose(1, 2).reshape(*states_PND.shape[:2], -1))


def _causal_attention(query_XHTd: Tensor, key_XGTd: Tensor, value_XGTd: Tensor) -> Tensor:
    """Causal attention of X short sequences, [X, H, T, d]; takes 0.7 times the time of torch's on CPUs.

    Queries are taken by blocks, which see no more keys than the last of a block does.
    """
    tokens, query = query_XHTd.shape[2], query_XHTd.unflatten(1, (key_XGTd.shape[1], -1))
    keys_YdT, values_YTd = key_XGTd.flatten(0, 1).transpose(1, 2), value_XGTd.flatten(0, 1)
    future_TT = query.new_full((_BLOCK, _BLOCK), -torch.inf).triu(1)
    mixed = query.new_empty(query.permute(0, 3, 1, 2, 4).shape)
    for start in range(0, tokens, _BLOCK):
        end = min(start + _BLOCK, tokens)
        block = query[..., start:end, :]
        scores = torch.bmm(block.flatten(2, 3).flatten(0, 1), keys_YdT[..., :end])
        own_block = scores.view(*block.shape[:-1], end)[..., start:]
        own_block += future_TT[: end - start, : end - start]
        mixed_block = torch.bmm(scores.softmax(-1), values_YTd[:, :end]).view(block.shape)
        mixed[:, start:end] = mixed_block.permute(0, 3, 1, 2, 4)
    return mixed.flatten(2, 3).transpose(1, 2)


@dataclass(frozen=True)
class CachedContext:
    """Earlier tokens have given keys and values. A compared token adds only its own.

    This serves context `reference` (all T tokens of a sequence at once, S = T) and `committed` (one token at a time,
    T = 1). The compared tokens are the last T of the S positions. So a token's own slot lies on the diagonal that ends
    in the last corner of the [T, S] scores.

    Attributes:
        project: makes queries, keys and values of the compared tokens.
        tokens: T.
        keys: per layer [B, G, S, d]; a compared token's own slot is replaced by its own key.
        values: per layer [B, G, S, d], in the same way.
        hidden: True where a key must not be seen (later tokens, padding), [B, T, S]; None if all keys are seen.
        keeps: whether to write the compared tokens' own keys and values into their slots; then P must be 1.
    """

    project: Projections
    tokens: int
    keys: list[Tensor]
    values: list[Tensor]
    hidden: Masks
    keeps: bool = False

    def __call__(self, layer: DuoDecoderLayer, states_PND: Tensor) -> Tensor:
        """Attention output [P, N, D], N = B * T."""
        attention = layer.self_attn
        keys_BGSd, values_BGSd = self.keys[layer.layer_idx], self.values[layer.layer_idx]
        own_slot = keys_BGSd.shape[2] - self.tokens
        query, key, value = self.project(attention, states_PND, self.tokens)
        if self.keeps:
            keys_BGSd[:, :, own_slot:], values_BGSd[:, :, own_slot:] = key[0].transpose(1, 2), value[0].transpose(1, 2)
        query = query.unflatten(3, (key.shape[3], -1))
        # One product per sequence and key head for all prefixes together: [H / G * P * T, d] x [d, S].
        rows = query.permute(1, 3, 4, 0, 2, 5)
        scores = torch.matmul(rows.flatten(2, 4), keys_BGSd.transpose(2, 3)).view(*rows.shape[:-1], -1)
        hidden_BTS = self.hidden[attention.sliding_window]
        if hidden_BTS is not None:
            scores.masked_fill_(hidden_BTS[:, None, None, None], -torch.inf)
        own_scores = (query * key[..., None, :]).sum(-1)
        scores.diagonal(own_slot, -2, -1).copy_(own_scores.permute(1, 3, 4, 0, 2))
        weights = scores.softmax(-1)
        own_weight = weights.diagonal(own_slot, -2, -1).clone()
        weights.diagonal(own_slot, -2, -1).zero_()
        mixed = torch.matmul(weights.flatten(2, 4), values_BGSd).view(rows.shape)
        # Back to [P, B, T, G, H / G, d].
        mixed = mixed.permute(3, 0, 4, 1, 2, 5)
        mixed = torch.addcmul(mixed, own_weight.permute(3, 0, 4, 1, 2)[..., None], value[..., None, :])
        return attention.o_proj(mixed.reshape(*states_PND.shape[:2], -1))


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
    def _plain(self) -> bool:
        """Whether no token is padding."""
        return self.attention_mask is None or bool(self._mask_BT.all())

    @cached_property
    def label_ND(self) -> Tensor:
        """The embeddings of the labels in the head."""
        return self.model.lm_head.weight[self.labels_N]

    @cached_property
    def projections(self) -> Projections:
        """Makes queries, keys and values at all positions."""
        layers: Any = self.model.model.layers
        return Projections.of([layer.self_attn for layer in layers], self._rotary)

    def states(self) -> Tensor:
        """Return the normalised final states of the predicting tokens with all layers big, [N, D]."""
        return self._forward(None, None).flatten(0, 1)

    def shared_context(self) -> SharedContext:
        """Return the context in which every token attends to tokens on the same route."""
        visible: Masks = {
            window: None if self._plain and window is None else self._visible(window) for window in self._windows
        }
        return SharedContext(self.projections, self.ids_BT.shape[1], visible)

    def reference_context(self, reference: Tensor | None) -> CachedContext:
        """Return the context in which earlier tokens take reference routes, [L] or [B, T, L]; default all big."""
        cache = DynamicCache()  # unlike the model's own, it keeps what has left a sliding window
        if reference is None:
            self._forward(None, cache)
        else:
            shape = (*self.input_ids.shape, self.model.config.num_hidden_layers)
            routes = check_routes(reference, *shape).to(self.input_ids.device)
            self._forward(routes if routes.ndim == 1 else routes[:, :-1], cache)
        hidden: Masks = {window: ~self._visible(window) for window in self._windows}
        cached: list[Any] = cache.layers
        keys, values = [self.projections.as_projected(each.keys) for each in cached], [each.values for each in cached]
        return CachedContext(self.projections, self.ids_BT.shape[1], keys, values, hidden)

    def empty_context(self) -> CachedContext:
        """Return a context in which no token has keys or values yet; `step_context` narrows it to a position."""
        config, (batch, positions) = self.model.config, self.ids_BT.shape
        _, groups, width = config.attention_shape
        shape = (config.num_hidden_layers, batch, groups, positions, width)
        keys, values = (list(self.hidden_BTD.new_zeros(shape)) for _ in range(2))
        return CachedContext(self.projections, 1, keys, values, {})

    def step_context(self, filled: CachedContext, position: int) -> CachedContext:
        """Return the context in which tokens at `position` attend to the earlier ones."""
        here = slice(position, position + 1)
        hidden: Masks = {
            window: None
            if self._plain and (window is None or position < window)
            else ~self._visible(window)[:, here, : position + 1]
            for window in self._windows
        }
        keys, values = ([each[:, :, : position + 1] for each in cached] for cached in (filled.keys, filled.values))
        return CachedContext(self.projections.at(here), 1, keys, values, hidden)

    def _forward(self, routes: Tensor | None, cache: DynamicCache | None) -> Tensor:
        return self.model.model(
            input_ids=self.ids_BT,
            attention_mask=None if self._plain else self._mask_BT.long(),
            position_ids=self._positions_BT,
            past_key_values=cache,
            use_cache=cache is not None,
            policy=None if routes is None else FixedRoutes(routes),
        ).last_hidden_state

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
