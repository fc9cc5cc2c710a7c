"""Parameters, FLOPs and bytes of a duo model, counted from its configuration.

A matrix product [m, k] x [k, n] counts 2mkn FLOPs; element-wise work (norms, softmax, rotary, biases) is
not counted. Attention is causal: a token attends to itself and to those before it, up to its layer's window.
"""

from collections.abc import Sequence
from typing import NamedTuple

from duollm.models.branch import Branch
from duollm.models.configuration_duo import DuoConfig
from duollm.routes.space import RouteSpace

Route = Sequence[int] | int
"""A branch value for every layer, or a number of big layers, the others small."""


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
    """One number per branch, indexed by the value of `Branch`."""

    skip: int
    small: int
    big: int


class SearchCost(NamedTuple):
    """Cost of a search for one sequence: how often each part is evaluated, and FLOPs."""

    attention: int
    small: int
    big: int
    head: int
    flops: int


def count_parameters(config: DuoConfig) -> Parameters:
    """Count the parameters of the whole model by part."""
    layers, hidden = config.num_hidden_layers, config.hidden_size
    entries, ffn, (of_attention, of_small, of_big) = layer_parameters(config), ffn_parameters(config), _biases(config)
    positions = config.max_position_embeddings + 2 if config.positions == "learned" else 0  # two more, as in OPT
    norms = (2 * layers + 1) * hidden * (2 if config.norm == "layer" else 1)
    return Parameters(
        embedding=(config.vocab_size + positions) * hidden,
        attention=layers * (entries.big - ffn.big + of_attention),
        big=layers * (ffn.big + of_big),
        small=layers * (ffn.small + of_small),
        norms=norms + (2 * layers * config.attention_shape[2] if config.qk_norm else 0),
        head=0 if config.tie_word_embeddings else config.vocab_size * hidden,
    )


def ffn_parameters(config: DuoConfig) -> ByBranch:
    """Count the matrix entries of one layer's FFN by branch: gate (if it is gated), up and down."""
    big = 3 if config.gated_ffn else 2
    small = 2 if config.small_linear else big
    widths = config.small_intermediate_size, config.intermediate_size
    return ByBranch(0, *(config.hidden_size * each * width for each, width in zip((small, big), widths, strict=True)))


def layer_parameters(config: DuoConfig) -> ByBranch:
    """Count, by branch, the matrix entries of one layer that a token uses, attention included.

    A layer skipped with `skip_scope="layer"` still computes the token's keys and values.
    """
    queries, keys_and_values = _attention_widths(config)
    attention, ffn = config.hidden_size * (2 * queries + keys_and_values), ffn_parameters(config)
    skip = config.hidden_size * keys_and_values if config.skip_scope == "layer" else attention
    return ByBranch(skip, attention + ffn.small, attention + ffn.big)


def layer_flops(config: DuoConfig, context_length: int) -> ByBranch:
    """Count the forward FLOPs of one layer for one token by branch, attention included.

    `context_length` is the number of positions that the token attends to, itself included: those in the
    layer's window if it has one.
    """
    scores = 2 * 2 * _attention_widths(config)[0] * context_length  # queries times keys, weights times values
    skip, small, big = (2 * entries for entries in layer_parameters(config))
    return ByBranch(skip if config.skip_scope == "layer" else skip + scores, small + scores, big + scores)


def head_flops(config: DuoConfig) -> int:
    """Count the forward FLOPs of the output head for one token."""
    return 2 * config.hidden_size * config.vocab_size


def token_flops(config: DuoConfig, route: Route, context_length: int) -> int:
    """Count the forward FLOPs of one token under a route, without the output head (`head_flops`).

    Raises:
        ValueError: the route does not fit the model's number of layers.
    """
    seen = (min(window or context_length, context_length) for window in config.windows)
    route = _as_route(config, route)
    return sum(layer_flops(config, length)[branch] for branch, length in zip(route, seen, strict=True))


def sequence_flops(config: DuoConfig, route: Route, sequence_length: int) -> int:
    """Count the forward FLOPs of a causal sequence whose tokens all take one route, output head included."""
    pairs = zip(_as_route(config, route), _flops_over_sequence(config, sequence_length), strict=True)
    return sum(layer[branch] for branch, layer in pairs) + sequence_length * head_flops(config)


def mean_token_flops(config: DuoConfig, branch_shares: Sequence[float], sequence_length: int) -> float:
    """Count a token's mean forward FLOPs in a causal sequence, output head included.

    `branch_shares` are the shares of tokens that take (skip, small, big) at every layer.
    """
    layers = _flops_over_sequence(config, sequence_length)
    in_layers = sum(share * flops for layer in layers for share, flops in zip(branch_shares, layer, strict=True))
    return in_layers / sequence_length + head_flops(config)


def training_flops(config: DuoConfig, branch_shares: Sequence[float], sequence_length: int, tokens: int) -> int:
    """Count the FLOPs of training on `tokens` tokens: the forward pass, and twice as many for the gradients."""
    return round(3 * mean_token_flops(config, branch_shares, sequence_length) * tokens)


def training_steps(tokens: int, batch_size: int, sequence_length: int) -> int:
    """Return the number of optimiser steps, at least 1, whose tokens come nearest to `tokens`."""
    return max(1, round(tokens / (batch_size * sequence_length)))


def naive_search(config: DuoConfig, sequence_length: int, space: RouteSpace | None = None) -> SearchCost:
    """Count the search of every route of a sequence with one forward pass per route; default: small or big layers."""
    space, ffns, flops = space or RouteSpace(config.num_hidden_layers), [0, 0, 0], 0
    for index, layer in enumerate(_flops_over_sequence(config, sequence_length)):
        taken = [space.fixed[index]] if index in space.fixed else space.branches
        for branch in taken:
            ffns[branch] += space.size // len(taken)
            flops += space.size // len(taken) * layer[branch]
    heads = space.size * sequence_length * head_flops(config)
    return SearchCost(space.num_layers * space.size, ffns[Branch.SMALL], ffns[Branch.BIG], space.size, flops + heads)


def shared_search(
    config: DuoConfig, sequence_length: int, space: RouteSpace | None = None, width: int | None = None
) -> SearchCost:
    """Count the same search with every prefix of a route evaluated once.

    The number of prefixes that enter a layer is the number of routes through the layers before; in a beam, at most
    `width` enter a layer that asks for a choice.
    """
    space, ffns, flops = space or RouteSpace(config.num_hidden_layers), [0, 0, 0], 0
    ffn, prefixes, attention = ffn_parameters(config), 1, 0
    other_ffns = 2 * sequence_length * (sum(ffn[branch] for branch in space.branches) - ffn.big)
    for index, layer in enumerate(_flops_over_sequence(config, sequence_length)):
        taken = [space.fixed[index]] if index in space.fixed else space.branches
        if index in space.leaders:
            prefixes = min(prefixes, width or prefixes)
            flops += prefixes * (layer.big + other_ffns)
        else:
            flops += sum(prefixes // len(taken) * layer[branch] for branch in taken)
        attention += prefixes
        for branch in taken:
            ffns[branch] += prefixes if index in space.leaders else prefixes // len(taken)
        prefixes *= space.base if index in space.leaders else 1
    heads = prefixes * sequence_length * head_flops(config)
    return SearchCost(attention, ffns[Branch.SMALL], ffns[Branch.BIG], prefixes, flops + heads)


def _flops_over_sequence(config: DuoConfig, sequence_length: int) -> list[ByBranch]:
    """Sum `layer_flops` over a sequence's tokens, for each layer."""
    alone, with_one = layer_flops(config, 0), layer_flops(config, 1)
    sums = []
    for window in config.windows:
        full = min(window or sequence_length, sequence_length)  # from there on a token sees as many positions
        seen = full * (full + 1) // 2 + (sequence_length - full) * full
        pairs = zip(alone, with_one, strict=True)
        sums.append(ByBranch(*(sequence_length * fixed + seen * (one - fixed) for fixed, one in pairs)))
    return sums


def _as_route(config: DuoConfig, route: Route) -> Sequence[int]:
    layers = config.num_hidden_layers
    if isinstance(route, int) and 0 <= route <= layers:
        return [2] * route + [1] * (layers - route)
    if isinstance(route, int) or len(route) != layers:
        raise ValueError(f"a model of {layers} layers needs a branch for each or 0 .. {layers} big layers, got {route}")
    return route


def _attention_widths(config: DuoConfig) -> tuple[int, int]:
    """Numbers that make up a token's queries, and its keys and values together."""
    heads, key_value_heads, width = config.attention_shape
    return heads * width, 2 * key_value_heads * width


def _biases(config: DuoConfig) -> tuple[int, int, int]:
    """Numbers of biases of one layer: of the attention, the small FFN and the big one."""
    hidden, per_neuron = config.hidden_size, 2 if config.gated_ffn else 1
    on_inputs = sum(_attention_widths(config)) if config.attention_bias or config.qkv_bias else 0
    widths = config.small_intermediate_size, config.intermediate_size
    small, big = (config.mlp_bias * (per_neuron * width + hidden) for width in widths)
    return on_inputs + hidden * config.attention_bias, hidden if config.small_linear else small, big
