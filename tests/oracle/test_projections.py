"""Joined projections and attention by blocks against the model's own parts."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from duollm.oracle.contexts import Batch, _causal_attention
from tiny import random_ids, tiny_model


def scores(heads):
    """Scores of every query and key, [P, B, H, T, T]."""
    query, key, _ = (each.transpose(2, 3) for each in heads)
    return query @ key.repeat_interleave(query.shape[2] // key.shape[2], dim=2).transpose(-1, -2)


@torch.inference_mode()
@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_joined_projections_give_the_scores_and_values_of_the_layer(positions):
    model = tiny_model(num_key_value_heads=1, positions=positions, qkv_bias=True)
    batch = Batch(model, random_ids(2, 8))
    attention = model.model.layers[1].self_attn
    states_PND = torch.randn(3, 14, model.config.hidden_size)
    joined = batch.projections
    own = type(joined)(joined.rotary, None)
    assert joined.joined is not None
    found, expected = (each(attention, states_PND, 7) for each in (joined, own))
    torch.testing.assert_close(scores(found), scores(expected))
    torch.testing.assert_close(found[2], expected[2])


@pytest.mark.parametrize(
    "touch", [lambda layer: layer.register_forward_hook(lambda *_: None), lambda layer: layer.half()]
)
def test_projections_that_are_not_plain_are_left_to_the_layers(touch):
    model = tiny_model()
    touch(model.model.layers[2].self_attn.v_proj)
    assert Batch(model, random_ids()).projections.joined is None


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 130])
def test_attention_by_blocks_is_causal_attention(tokens):
    query, key, value = (torch.randn(3, heads, tokens, 8) for heads in (4, 2, 2))
    expected = scaled_dot_product_attention(query, key, value, is_causal=True, scale=1.0, enable_gqa=True)
    torch.testing.assert_close(_causal_attention(query, key, value), expected)
