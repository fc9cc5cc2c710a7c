"""A batch of text prepared for search, and what its tokens attend to (docs/oracle.md, "The three contexts").

`Batch` holds the text. Each context turns normalised states of all prefixes into attention outputs for one layer.
`Projections` makes the queries, keys and values of many prefixes with few passes over the states.

Shape letters: P prefixes, B sequences, T tokens that are compared, N = B * T, S = tokens up to and including
those, H heads, G key/value heads, d head width, L layers, D hidden, X = P * B, Y = X * G.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers.cache_utils import DynamicCache

from duollm.models.attention import DuoAttention, Rotary
from duollm.models.ffn import is_plain, nobody_watches
from duollm.models.modeling_duo import DuoDecoderLayer, DuoForCausalLM
from duollm.models.policy import FixedRoutes, check_routes

Heads = tuple[Tensor, Tensor, Tensor]
"""Scaled queries [P, B, T, H, d], and keys and values [P, B, T, G, d]."""

_MOST_BYTES = 64 * 2**20
"""Of joined weights. A model that needs more spends its time in the products themselves."""


@dataclass(frozen=True)
class Projections:
    """Projects the states of some positions; by one product per layer where nobody would notice.

    A rotation turns the numbers i and i + d/2 of a head together. The joined weights put the two side by side, so that
    a pair is a complex number and rotating is one multiplication. Scores do not change, because the numbers of queries
    and keys are rearranged alike.

    Attributes:
        rotary: cosines and sines [B, T, d]; None without rotary positions.
        joined: per layer the weight [(H + 2G) * d, D] and bias; None where the layers' own modules must run.
        turns_BT1c: the rotation of each pair, complex [B, T, 1, d/2].
    """

    rotary: Rotary | None
    joined: list[tuple[Tensor, Tensor | None]] | None
    turns_BT1c: Tensor | None = None

    @classmethod
    def of(cls, layers: Sequence[DuoAttention], rotary: Rotary | None) -> Self:
        """Join the weights of all layers, if they are plain float32 on a CPU and their rotation is the usual one."""
        size = sum(each.weight.nbytes for layer in layers for each in _products(layer))
        watched = torch.is_autocast_enabled("cpu") or not nobody_watches()
        if size > _MOST_BYTES or watched or not all(map(_may_join, layers)):
            return cls(rotary, None)
        if rotary is None:
            return cls(None, [_join(layer, rotated=False) for layer in layers])
        (cos, cos_again), (sin, sin_again) = (each.chunk(2, dim=-1) for each in rotary)
        if not (cos.equal(cos_again) and sin.equal(sin_again) and cos.dtype == torch.float32):
            return cls(rotary, None)
        return cls(rotary, [_join(layer, rotated=True) for layer in layers], torch.complex(cos, sin)[:, :, None])

    def at(self, here: slice) -> Self:
        """Return the projections at some of the positions."""
        rotary = None if self.rotary is None else (self.rotary[0][:, here], self.rotary[1][:, here])
        turns_BT1c = None if self.turns_BT1c is None else self.turns_BT1c[:, here]
        return type(self)(rotary, self.joined, turns_BT1c)

    def __call__(self, attention: DuoAttention, states_PND: Tensor, tokens: int) -> Heads:
        """Project normalised states [P, B * T, D], T = `tokens`."""
        heads, groups, width = attention.config.attention_shape
        prefixes, rows, _ = states_PND.shape
        shape = (prefixes, rows // tokens, tokens, -1, width)
        if self.joined is None:
            rotary = self.rotary
            if rotary is not None and len(rotary[0]) > 1:
                rotary = (rotary[0].repeat(prefixes, 1, 1), rotary[1].repeat(prefixes, 1, 1))
            projected = attention.project(states_PND.reshape(-1, tokens, states_PND.shape[-1]), rotary)
            query, key, value = (each.transpose(1, 2).view(shape) for each in projected)
            return query * attention.scaling, key, value
        projected_PBThd = linear(states_PND, *self.joined[attention.layer_idx]).view(shape)
        if self.turns_BT1c is not None:
            pairs = torch.view_as_complex(projected_PBThd[..., : heads + groups, :].unflatten(-1, (-1, 2)))
            pairs.mul_(self.turns_BT1c)
        query, key, value = projected_PBThd.split((heads, groups, groups), dim=3)
        return query, key, value

    def as_projected(self, keys_BGSd: Tensor) -> Tensor:
        """Arrange keys that the model cached as `__call__` arranges its own."""
        return keys_BGSd if self.turns_BT1c is None else _paired(keys_BGSd)


def _products(layer: DuoAttention) -> list[torch.nn.Linear]:
    return [layer.q_proj, layer.k_proj, layer.v_proj]


def _may_join(layer: DuoAttention) -> bool:
    """Whether the weights of the three products say all about them."""
    plain = layer.q_norm is None and all(map(is_plain, _products(layer)))
    return plain and all(
        each.weight.dtype == torch.float32 and each.weight.device.type == "cpu" for each in _products(layer)
    )


def _join(layer: DuoAttention, rotated: bool) -> tuple[Tensor, Tensor | None]:
    """The joined weight and bias; the queries' are scaled."""
    weights = [each.weight for each in _products(layer)]
    biases = [each.bias for each in _products(layer) if each.bias is not None]
    return _joined(layer, weights, rotated), _joined(layer, biases, rotated) if biases else None


def _joined(layer: DuoAttention, parts: Sequence[Tensor], rotated: bool) -> Tensor:
    query, key, value = (each.unflatten(0, (-1, layer.head_dim)) for each in parts)
    if rotated:
        query, key = (_paired(each.movedim(1, -1)).movedim(-1, 1) for each in (query, key))
    return torch.cat([query * layer.scaling, key, value]).flatten(0, 1)


def _paired(numbers: Tensor) -> Tensor:
    """Put the numbers i and i + d/2 of the last axis side by side."""
    return numbers.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


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
