"""What the attention function is told: positions of packed rows, and whether it is causal."""

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from duollm.models.branch import Branch
from tiny import random_ids, tiny_model

ROUTE = [int(Branch.SMALL), int(Branch.BIG), int(Branch.SKIP)]


def varlen(module, query, key, value, attention_mask, position_ids=None, **kwargs):
    """What flash attention does with a packed row: no mask is given, a text begins where positions fall back to 0."""
    assert attention_mask is None
    texts_T = (position_ids[0] == 0).cumsum(-1)
    mask_TT = (texts_T[:, None] == texts_T) & torch.ones(len(texts_T), len(texts_T), dtype=torch.bool).tril()
    return sdpa_attention_forward(module, query, key, value, mask_TT[None, None], **kwargs)


AttentionInterface.register("varlen_in_plain_torch", varlen)


@pytest.mark.parametrize("routes", [None, ROUTE], ids=["all big", "mixed"])
@pytest.mark.parametrize("attention", ["varlen_in_plain_torch", "sdpa", "eager"])
@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_texts_packed_into_a_row_do_not_see_each_other(attention, routes, positions):
    model, texts = tiny_model(positions=positions), [random_ids(1, 5), random_ids(1, 4, seed=3)]
    alone = torch.cat([model(text, routes=routes).logits for text in texts], 1)
    model.set_attn_implementation(attention)
    packed = {"position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]]), "routes": routes}
    torch.testing.assert_close(model(torch.cat(texts, 1), **packed).logits, alone, atol=1e-5, rtol=1e-5)
    assert (model(torch.cat(texts, 1), routes=routes).logits - alone).abs().max() > 0.1


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("sizes", [{}, {"sliding_window": 5}], ids=["full", "sliding"])
def test_a_model_that_is_not_causal_sees_what_follows(attention, sizes):
    ids, other = random_ids(), random_ids()
    other[:, -1] = (other[:, -1] + 1) % 31
    model = tiny_model(attention=attention, is_causal=False, **sizes)
    assert not torch.allclose(model(ids, use_cache=False).logits[:, 5], model(other, use_cache=False).logits[:, 5])
    causal = tiny_model(attention=attention, **sizes)
    assert torch.equal(causal(ids).logits[:, 5], causal(other).logits[:, 5])
    asked = causal(ids, is_causal=False, use_cache=False).logits
    torch.testing.assert_close(asked, model(ids, use_cache=False).logits)
