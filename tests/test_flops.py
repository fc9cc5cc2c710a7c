from itertools import product

import numpy as np
import pytest
from torch.utils.flop_counter import FlopCounterMode

from dense import VARIANTS
from duollm import DuoConfig, DuoForCausalLM, RouteSpace
from duollm.flops import (
    ByBranch,
    count_parameters,
    head_flops,
    layer_flops,
    naive_search,
    sequence_flops,
    shared_search,
    token_flops,
    training_flops,
)
from duollm.models.families import duo_config
from tiny import random_ids

SKIP, SMALL, BIG = 0, 1, 2
LAYERS, HIDDEN, HEADS, KEY_VALUE_HEADS, INNER, SMALL_INNER, VOCABULARY = 4, 24, 6, 2, 40, 8, 50
KEY_VALUE_WIDTH = HIDDEN // HEADS * KEY_VALUE_HEADS


def toy(**changes):
    sizes = dict(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        intermediate_size=INNER,
        small_intermediate_size=SMALL_INNER,
    )
    return DuoConfig(**(sizes | changes))


def paper():
    return DuoConfig(
        vocab_size=32_000,
        hidden_size=2560,
        num_hidden_layers=12,
        num_attention_heads=20,
        num_key_value_heads=20,
        intermediate_size=10_240,
        small_intermediate_size=640,
    )


def products(branch, context, skip_scope):
    """Every matrix product of one layer for one token, written out as (m, k, n)."""
    keys_and_values = [(1, HIDDEN, KEY_VALUE_WIDTH)] * 2
    if branch == SKIP and skip_scope == "layer":
        return keys_and_values
    head = HIDDEN // HEADS
    attention = keys_and_values + [(1, HIDDEN, HIDDEN)] * 2 + HEADS * [(1, head, context), (1, context, head)]
    inner = {SKIP: 0, SMALL: SMALL_INNER, BIG: INNER}[branch]
    return [*attention, (1, HIDDEN, inner), (1, HIDDEN, inner), (1, inner, HIDDEN)]


def naive_token_flops(route, context, skip_scope="ffn"):
    return sum(2 * m * k * n for branch in route for m, k, n in products(branch, context, skip_scope))


def test_paper_parameters():
    parts = count_parameters(paper())
    assert parts.big == 943_718_400
    assert parts.small == 58_982_400
    assert parts.attention == 314_572_800
    assert parts.embedding == 81_920_000
    assert parts.head == 0
    assert f"{parts.total / 1e9:.3f}" == "1.399"


def test_parameters_match_a_list_of_the_weights():
    layer = [(HIDDEN, HIDDEN)] * 2 + [(HIDDEN, KEY_VALUE_WIDTH)] * 2 + [(HIDDEN, 1)] * 2
    layer += [(HIDDEN, INNER)] * 3 + [(HIDDEN, SMALL_INNER)] * 3
    weights = LAYERS * layer + [(VOCABULARY, HIDDEN), (HIDDEN, 1)]
    assert count_parameters(toy()).total == sum(rows * columns for rows, columns in weights)


def test_untied_head_is_counted():
    tied, untied = count_parameters(toy()), count_parameters(toy(tie_word_embeddings=False))
    assert untied.head == VOCABULARY * HIDDEN
    assert untied.total == tied.total + VOCABULARY * HIDDEN


@pytest.mark.parametrize("skip_scope", ["ffn", "layer"])
@pytest.mark.parametrize("route", [[BIG, SMALL, SKIP, BIG], [SKIP] * LAYERS, [SMALL] * LAYERS])
def test_token_flops_match_the_naive_count(route, skip_scope):
    assert token_flops(toy(skip_scope=skip_scope), route, 7) == naive_token_flops(route, 7, skip_scope)


def test_a_number_of_big_layers_stands_for_a_route():
    assert token_flops(toy(), 3, 5) == naive_token_flops([BIG, SMALL, BIG, BIG], 5)


@pytest.mark.parametrize("skip_scope", ["ffn", "layer"])
def test_sequence_flops_are_the_sum_over_tokens(skip_scope):
    route, length = [BIG, SKIP, SMALL, BIG], 6
    tokens = sum(naive_token_flops(route, context, skip_scope) for context in range(1, length + 1))
    heads = length * 2 * HIDDEN * VOCABULARY
    assert sequence_flops(toy(skip_scope=skip_scope), route, length) == tokens + heads


def test_training_is_three_forwards_of_the_average_route():
    routes = [[SMALL, BIG, BIG, SMALL], [BIG, SMALL, SMALL, BIG]]
    forward = sum(sequence_flops(toy(), route, 8) for route in routes)
    assert training_flops(toy(), (0.0, 0.5, 0.5), sequence_length=8, tokens=16) == 3 * forward


def test_search_costs_match_counting_routes_and_prefixes():
    model, length = toy(), 5
    routes = [[BIG if route >> layer & 1 else SMALL for layer in range(LAYERS)] for route in range(2**LAYERS)]
    naive = naive_search(model, length)
    assert naive.flops == sum(sequence_flops(model, route, length) for route in routes)
    assert naive.big == sum(route.count(BIG) for route in routes)
    assert naive.attention == LAYERS * len(routes)

    shared = shared_search(model, length)
    assert shared.attention == len({tuple(route[:layer]) for route in routes for layer in range(LAYERS)})
    one_layer = toy(num_hidden_layers=1)
    attention = sum(layer_flops(one_layer, context).skip for context in range(1, length + 1))
    ffns = length * 2 * 3 * HIDDEN * (INNER + SMALL_INNER)
    assert shared.flops == shared.attention * (attention + ffns) + len(routes) * length * head_flops(model)


def test_twelve_layers_share_as_the_design_says():
    shared, naive = shared_search(paper(), 128), naive_search(paper(), 128)
    assert (shared.attention, shared.small, shared.big) == (4095, 4095, 4095)
    assert (naive.attention, naive.small, naive.big) == (49_152, 24_576, 24_576)


@pytest.mark.parametrize("skip_scope", ["ffn", "layer"])
def test_searches_with_skip_match_counting_routes_and_prefixes(skip_scope):
    model, length, branches = toy(skip_scope=skip_scope), 5, (SKIP, SMALL, BIG)
    routes = list(product(branches, repeat=LAYERS))
    naive = naive_search(model, length, RouteSpace(LAYERS, branches))
    assert naive.flops == sum(sequence_flops(model, route, length) for route in routes)
    assert naive.small == sum(route.count(SMALL) for route in routes)
    # The tree evaluates attention once for all branches of a prefix: skipping the FFN adds nothing.
    with_skip = shared_search(model, length, RouteSpace(LAYERS, branches))
    assert (with_skip.attention, with_skip.head) == (sum(3**depth for depth in range(LAYERS)), len(routes))
    per_prefix = length * 2 * 3 * HIDDEN * (INNER + SMALL_INNER)
    attention = sum(layer_flops(toy(num_hidden_layers=1), context).skip for context in range(1, length + 1))
    assert with_skip.flops == with_skip.attention * (attention + per_prefix) + len(routes) * length * head_flops(model)


@pytest.mark.parametrize("skip_scope", ["ffn", "layer"])
def test_searches_over_groups_match_counting_routes_and_prefixes(skip_scope):
    model, length = toy(skip_scope=skip_scope), 5
    space = RouteSpace(LAYERS, (SKIP, BIG), [[0, 1], [3]], {2: SMALL})
    routes = space.decode(np.arange(space.size)).tolist()
    naive, shared = naive_search(model, length, space), shared_search(model, length, space)
    assert naive.flops == sum(sequence_flops(model, route, length) for route in routes)
    assert (naive.small, naive.big) == (4, sum(route.count(BIG) for route in routes))
    assert (shared.head, shared.attention) == (4, 1 + 2 + 2 + 2)
    # Layer 0 does both branches of one prefix, layer 1 one each of two, layer 2 small of two, layer 3 both of two.
    assert (shared.small, shared.big) == (2, 1 + 1 + 2)
    layer = layer_flops_of_sequence(model, length)
    followed = layer.skip + layer.big + 2 * layer.small
    assert shared.flops == 3 * layer.big + followed + 4 * length * head_flops(model)


def layer_flops_of_sequence(model, length):
    """One layer's FLOPs over a sequence, by branch."""
    one = toy(num_hidden_layers=1, skip_scope=model.skip_scope)
    return ByBranch(*(sequence_flops(one, [each], length) - length * head_flops(one) for each in (SKIP, SMALL, BIG)))


def test_a_beam_is_a_tree_that_grows_no_wider():
    model, tree = toy(), shared_search(toy(), 5)
    beam = shared_search(model, 5, width=3)
    assert (beam.attention, beam.head) == (1 + 2 + 3 + 3, 2 * 3)
    per_prefix = (tree.flops - tree.head * 5 * head_flops(model)) // tree.attention
    assert beam.flops == beam.attention * per_prefix + beam.head * 5 * head_flops(model)
    assert shared_search(model, 5, width=8) == tree


@pytest.mark.parametrize("route", [[BIG] * (LAYERS - 1), LAYERS + 1, -1])
def test_a_route_that_does_not_fit_is_refused(route):
    with pytest.raises(ValueError, match=f"{LAYERS} layers"):
        token_flops(toy(), route, 1)


class TestDenseFamilies:
    """Counts of converted models against torch: its parameters, and the FLOPs that it counts itself."""

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_parameters(self, variant):
        model = DuoForCausalLM(duo_config(VARIANTS[variant], 6, "ffn"))
        sizes = {name: each.numel() for name, each in model.named_parameters()}
        counted = count_parameters(model.config)
        assert counted.total == sum(sizes.values())
        assert counted.small == sum(size for name, size in sizes.items() if ".mlp.small." in name)
        assert counted.attention == sum(size for name, size in sizes.items() if "_attn" in name and "norm" not in name)
        assert counted.norms == sum(size for name, size in sizes.items() if "norm" in name)

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_flops_of_a_token_that_is_decoded(self, variant):
        config = duo_config(VARIANTS[variant], 6, "ffn")
        model, ids, route = DuoForCausalLM(config).eval(), random_ids(batch=1), [SMALL, SKIP, BIG]
        model.set_attn_implementation("eager")
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        with FlopCounterMode(display=False) as counter:
            model(ids[:, -1:], past_key_values=cache, routes=route)
        by_module = counter.get_flop_counts()
        rotation = sum(by_module.get("DuoForCausalLM.model.rotary_emb", {}).values())  # a product in torch 2.8 alone
        counted = counter.get_total_flops() - rotation
        assert counted == token_flops(config, route, ids.shape[1]) + head_flops(config)

    @pytest.mark.parametrize("variant", ["llama", "mistral", "qwen3-sliding", "opt"])
    def test_a_sequence_is_the_sum_of_its_tokens(self, variant):
        config = duo_config(VARIANTS[variant], 6, "ffn")
        tokens = sum(token_flops(config, [BIG, SKIP, SMALL], context) + head_flops(config) for context in range(1, 10))
        assert sequence_flops(config, [BIG, SKIP, SMALL], 9) == tokens
