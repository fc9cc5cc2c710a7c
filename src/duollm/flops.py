"""Parameters, FLOPs and bytes of the duo model, counted in plain integers.

A matrix product [m, k] x [k, n] counts 2mkn FLOPs; element-wise work (norms, softmax, rotary, biases) is
not counted. Attention is causal: a token attends to itself and to those before it, up to its layer's window.
"""
# ruff: noqa: D102

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, cast


class ModelSizes(Protocol):
    """What is counted: `duollm.config.ModelConfig`, `DuoConfig`, or anything with these numbers.

    Where a model also has `DuoConfig`'s fields on heads, norms, positions, biases, windows and the kind of
    FFN, they count too; else those of a plain Llama are assumed.
    """

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
    ffn, biases = ffn_parameters(model), _ffn_biases(model)
    return Parameters(
        embedding=embedding + _position_table(model),
        attention=layers * (_query_and_output(model) + _key_and_value(model) + _attention_biases(model)),
        big=layers * (ffn.big + biases.big),
        small=layers * (ffn.small + biases.small),
        norms=(2 * layers + 1) * hidden * (2 if _option(model, "norm", "rms") == "layer" else 1)
        + (2 * layers * _head_size(model) if _option(model, "qk_norm", False) else 0),
        head=0 if model.tie_word_embeddings else embedding,
    )


def ffn_parameters(model: ModelSizes) -> ByBranch:
    """Count the matrix entries of one layer's FFN by branch: gate (if it is gated), up and down."""
    per_neuron = (3 if _option(model, "gated_ffn", True) else 2) * model.hidden_size
    return ByBranch(0, per_neuron * model.small_intermediate_size, per_neuron * model.intermediate_size)


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

    `context_length` is the number of positions that the token attends to, itself included: those in the
    layer's window if it has one.
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
    seen = (context_length if window is None else min(window, context_length) for window in _windows(model))
    route = _as_route(model, route)
    return sum(layer_flops(model, length)[branch] for branch, length in zip(route, seen, strict=True))


def sequence_flops(model: ModelSizes, route: Sequence[int] | int, sequence_length: int) -> int:
    """Count the forward FLOPs of a causal sequence whose tokens all take one route, output head included."""
    layers, route = _flops_over_sequence(model, sequence_length), _as_route(model, route)
    in_layers = sum(layer[branch] for branch, layer in zip(route, layers, strict=True))
    return in_layers + sequence_length * head_flops(model)


def mean_token_flops(model: ModelSizes, branch_shares: Sequence[float], sequence_length: int) -> float:
    """Count a token's mean forward FLOPs in a causal sequence, output head included.

    `branch_shares` are the shares of tokens that take (skip, small, big) at every layer.
    """
    layers = _flops_over_sequence(model, sequence_length)
    in_layers = sum(share * flops for layer in layers for share, flops in zip(branch_shares, layer, strict=True))
    return in_layers / sequence_length + head_flops(model)


def training_flops(model: ModelSizes, branch_shares: Sequence[float], sequence_length: int, tokens: int) -> int:
    """Count the FLOPs of training on `tokens` tokens: the forward, and twice that for the gradients.

    `branch_shares` are the shares of tokens that take (skip, small, big) at every layer.
    """
    return round(3 * mean_token_flops(model, branch_shares, sequence_length) * tokens)


def training_steps(tokens: int, batch_size: int, sequence_length: int) -> int:
    """Return the number of optimiser steps, at least 1, whose tokens come nearest to `tokens`."""
    return max(1, round(tokens / (batch_size * sequence_length)))


def route_bytes(model: ModelSizes, route: Sequence[int] | int, bytes_per_parameter: int) -> int:
    """Count the bytes of weights that one token's forward pass reads under a route.

    One row of the embedding (and of learned positions), all norms and biases of the route, and the whole
    output head, tied or not.
    """
    entries, biases = layer_parameters(model), _ffn_biases(model)
    layers = sum(entries[branch] + biases[branch] + _attention_biases(model) for branch in _as_route(model, route))
    rows = model.hidden_size * (2 if _position_table(model) else 1)
    head = model.hidden_size * _vocab_size(model)
    return bytes_per_parameter * (rows + layers + count_parameters(model).norms + head)


def naive_search(model: ModelSizes, sequence_length: int) -> SearchCost:
    """Count the search of every small/big route of a sequence with one forward pass per route."""
    layers, routes = model.num_hidden_layers, 2**model.num_hidden_layers
    both = sum(layer.small + layer.big for layer in _flops_over_sequence(model, sequence_length))
    ffns = layers * routes // 2
    heads = routes * sequence_length * head_flops(model)
    return SearchCost(layers * routes, ffns, ffns, routes, routes // 2 * both + heads)


def shared_search(model: ModelSizes, sequence_length: int) -> SearchCost:
    """Count the same search with every prefix of a route evaluated once: 2^l prefixes enter layer l."""
    routes = 2**model.num_hidden_layers
    prefixes = routes - 1
    small_ffn = 2 * sequence_length * ffn_parameters(model).small
    layers = enumerate(_flops_over_sequence(model, sequence_length))
    attention_and_both_ffns = sum(2**depth * (layer.big + small_ffn) for depth, layer in layers)
    heads = routes * sequence_length * head_flops(model)
    return SearchCost(prefixes, prefixes, prefixes, routes, attention_and_both_ffns + heads)


def _flops_over_sequence(model: ModelSizes, sequence_length: int) -> list[ByBranch]:
    """Sum `layer_flops` over a sequence's tokens, for each layer."""
    alone, with_one = layer_flops(model, 0), layer_flops(model, 1)

    def layer(window: int | None) -> ByBranch:
        full = min(window or sequence_length, sequence_length)  # from there on a token sees as many positions
        seen = full * (full + 1) // 2 + (sequence_length - full) * full
        pairs = zip(alone, with_one, strict=True)
        return ByBranch(*(sequence_length * fixed + seen * (one - fixed) for fixed, one in pairs))

    return [layer(window) for window in _windows(model)]


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
    return int(_option(model, "head_dim", None) or model.hidden_size // model.num_attention_heads)


def _attention_biases(model: ModelSizes) -> int:
    on_output: bool = _option(model, "attention_bias", False)
    if not (on_output or _option(model, "qkv_bias", False)):
        return 0
    heads = model.num_attention_heads + 2 * (model.num_key_value_heads or model.num_attention_heads)
    return heads * _head_size(model) + (model.hidden_size if on_output else 0)


def _ffn_biases(model: ModelSizes) -> ByBranch:
    if not _option(model, "mlp_bias", False):
        return ByBranch(0, 0, 0)
    per_neuron, hidden = 2 if _option(model, "gated_ffn", True) else 1, model.hidden_size
    small, big = model.small_intermediate_size, model.intermediate_size
    return ByBranch(0, per_neuron * small + hidden, per_neuron * big + hidden)


def _position_table(model: ModelSizes) -> int:
    """Entries of a table of learned positions; two more than positions, as in OPT."""
    if _option(model, "positions", "rotary") != "learned":
        return 0
    return (int(_option(model, "max_position_embeddings", 0)) + 2) * model.hidden_size


def _windows(model: ModelSizes) -> Sequence[int | None]:
    """Per layer to how many positions a token attends at most; None: all."""
    unlimited = [None] * model.num_hidden_layers
    return cast(Sequence[int | None], _option(model, "windows", unlimited))


def _option(model: ModelSizes, name: str, default: Any) -> Any:
    """A field that only `DuoConfig` has; the default is Llama's."""
    return getattr(model, name, default)


def _vocab_size(model: ModelSizes) -> int:
    if model.vocab_size is None:
        raise ValueError("vocab_size is not known yet; set it before counting")
    return model.vocab_size
