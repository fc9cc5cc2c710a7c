"""Parameters, FLOPs and bytes of the duo model, counted in plain integers.

A matrix product [m, k] x [k, n] counts 2mkn FLOPs; element-wise work (norms, softmax, rotary) is not
counted. Attention is causal: a token attends to itself and to those before it.
"""
# ruff: noqa: D102

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class ModelSizes(Protocol):
    """What is counted: `duollm.config.ModelConfig`, `DuoConfig`, or anything with these numbers."""

    @property
    def vocab_size(self) -> int | None: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int | None: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def small_intermediate_size(self) -> int: ...
    @property
    def skip_scope(self) -> str: ...
    @property
    def tie_word_embeddings(self) -> bool: ...


class Parameters(NamedTuple):
    """Numbers of parameters by part; `head` is 0 when it is tied to the embedding."""

    embedding: int
    attention: int
    big: int
    small: int
    norms: int
    head: int

    @property
    def total(self) -> int:
        """All parameters, each counted once."""
        return sum(self)


class ByBranch(NamedTuple):
    """One number for each branch, indexed by the value of `Branch`."""

    skip: int
    small: int
    big: int


class SearchCost(NamedTuple):
    """Work of trying every small/big route of one sequence: times each part is evaluated, and FLOPs."""

    attention: int
    small: int
    big: int
    head: int
    flops: int


def count_parameters(model: ModelSizes) -> Parameters:
    """Count the parameters of the whole model by part."""
    layers, hidden = model.num_hidden_layers, model.hidden_size
    embedding = _vocab_size(model) * hidden
    ffn = ffn_parameters(model)
    return Parameters(
        embedding=embedding,
        attention=layers * (_query_and_output(model) + _key_and_value(model)),
        big=layers * ffn.big,
        small=layers * ffn.small,
        norms=(2 * layers + 1) * hidden,
        head=0 if model.tie_word_embeddings else embedding,
    )


def ffn_parameters(model: ModelSizes) -> ByBranch:
    """Count the parameters of one layer's FFN by branch (SwiGLU: gate, up and down, no biases)."""
    hidden = model.hidden_size
    return ByBranch(0, 3 * hidden * model.small_intermediate_size, 3 * hidden * model.intermediate_size)


def layer_parameters(model: ModelSizes) -> ByBranch:
    """Count the matrix entries of one layer that a token meets by branch, attention included.

    A layer skipped with `skip_scope="layer"` still computes the token's keys and values.
    """
    attention = _query_and_output(model) + _key_and_value(model)
    ffn = ffn_parameters(model)
    skip = _key_and_value(model) if model.skip_scope == "layer" else attention
    return ByBranch(skip, attention + ffn.small, attention + ffn.big)


def layer_flops(model: ModelSizes, context_length: int) -> ByBranch:
    """Count the forward FLOPs of one layer for one token by branch, attention included.

    `context_length` is the number of positions that the token attends to, itself included.
    """
    queries_times_keys = weights_times_values = 2 * model.num_attention_heads * _head_size(model) * context_length
    scores = queries_times_keys + weights_times_values
    skip, small, big = (2 * entries for entries in layer_parameters(model))
    return ByBranch(skip if model.skip_scope == "layer" else skip + scores, small + scores, big + scores)


def head_flops(model: ModelSizes) -> int:
    """Count the forward FLOPs of the output head for one token."""
    return 2 * model.hidden_size * _vocab_size(model)


def token_flops(model: ModelSizes, route: Sequence[int] | int, context_length: int) -> int:
    """Count the forward FLOPs of one token under a route, without the output head (`head_flops`).

    `route` is a branch value for every layer, or a number of big layers, the others small.

    Raises:
        ValueError: the route does not fit the model's number of layers.
    """
    by_branch = layer_flops(model, context_length)
    return sum(by_branch[branch] for branch in _as_route(model, route))


def sequence_flops(model: ModelSizes, route: Sequence[int] | int, sequence_length: int) -> int:
    """Count the forward FLOPs of a causal sequence whose tokens all take one route, output head included."""
    by_branch = _layer_flops_over_sequence(model, sequence_length)
    return sum(by_branch[branch] for branch in _as_route(model, route)) + sequence_length * head_flops(model)


def training_flops(model: ModelSizes, branch_shares: Sequence[float], sequence_length: int, tokens: int) -> int:
    """Count the FLOPs of training on `tokens` tokens: the forward, and twice that for the gradients.

    `branch_shares` are the shares of tokens that take (skip, small, big) at every layer.
    """
    by_branch = _layer_flops_over_sequence(model, sequence_length)
    layer = sum(share * flops for share, flops in zip(branch_shares, by_branch, strict=True))
    forward = model.num_hidden_layers * layer / sequence_length + head_flops(model)
    return round(3 * forward * tokens)


def training_steps(tokens: int, batch_size: int, sequence_length: int) -> int:
    """Return the number of optimiser steps, at least 1, whose tokens come nearest to `tokens`."""
    return max(1, round(tokens / (batch_size * sequence_length)))


def route_bytes(model: ModelSizes, route: Sequence[int] | int, bytes_per_parameter: int) -> int:
    """Count the bytes of weights that one token's forward pass reads under a route.

    One row of the embedding, all norms, and the whole output head, tied or not.
    """
    entries = layer_parameters(model)
    layers = sum(entries[branch] for branch in _as_route(model, route))
    row, head = model.hidden_size, model.hidden_size * _vocab_size(model)
    return bytes_per_parameter * (row + layers + count_parameters(model).norms + head)


def naive_search(model: ModelSizes, sequence_length: int) -> SearchCost:
    """Count the search of every small/big route of a sequence with one forward pass per route."""
    layers, routes = model.num_hidden_layers, 2**model.num_hidden_layers
    by_branch = _layer_flops_over_sequence(model, sequence_length)
    ffns = layers * routes // 2
    heads = routes * sequence_length * head_flops(model)
    return SearchCost(layers * routes, ffns, ffns, routes, ffns * (by_branch.small + by_branch.big) + heads)


def shared_search(model: ModelSizes, sequence_length: int) -> SearchCost:
    """Count the same search with every prefix of a route evaluated once: 2^l prefixes enter layer l."""
    routes = 2**model.num_hidden_layers
    prefixes = routes - 1
    small_ffn = 2 * sequence_length * ffn_parameters(model).small
    attention_and_both_ffns = _layer_flops_over_sequence(model, sequence_length).big + small_ffn
    heads = routes * sequence_length * head_flops(model)
    return SearchCost(prefixes, prefixes, prefixes, routes, prefixes * attention_and_both_ffns + heads)


def _layer_flops_over_sequence(model: ModelSizes, sequence_length: int) -> ByBranch:
    """Sum `layer_flops` over contexts of 1 .. T positions."""
    positions = sequence_length * (sequence_length + 1) // 2
    alone = layer_flops(model, 0)
    per_position = (flops - fixed for flops, fixed in zip(layer_flops(model, 1), alone, strict=True))
    return ByBranch(
        *(sequence_length * fixed + positions * each for fixed, each in zip(alone, per_position, strict=True))
    )


def _as_route(model: ModelSizes, route: Sequence[int] | int) -> Sequence[int]:
    layers = model.num_hidden_layers
    if isinstance(route, int):
        if not 0 <= route <= layers:
            raise ValueError(f"a model of {layers} layers has 0 .. {layers} big layers, got {route}")
        return [2] * route + [1] * (layers - route)
    if len(route) != layers:
        raise ValueError(f"a route of this model has {layers} layers, got {len(route)}")
    return route


def _query_and_output(model: ModelSizes) -> int:
    return 2 * model.hidden_size * model.num_attention_heads * _head_size(model)


def _key_and_value(model: ModelSizes) -> int:
    heads = model.num_key_value_heads or model.num_attention_heads
    return 2 * model.hidden_size * heads * _head_size(model)


def _head_size(model: ModelSizes) -> int:
    """Width of one attention head; converted checkpoints may set it apart from hidden_size / heads."""
    given: int | None = getattr(model, "head_dim", None)
    return given or model.hidden_size // model.num_attention_heads


def _vocab_size(model: ModelSizes) -> int:
    if model.vocab_size is None:
        raise ValueError("vocab_size is not known yet; set it before counting")
    return model.vocab_size
