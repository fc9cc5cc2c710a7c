"""Generation with a cache equals running the whole text again for every token."""

import pytest
import torch
from torch import Tensor

from duollm.models.branch import Branch
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.routing.linear import LinearRouter
from tiny import random_ids, tiny_model

NEW = 6
ROUTE = torch.tensor([Branch.SMALL, Branch.SKIP, Branch.BIG])


def router(model: DuoForCausalLM) -> LinearRouter:
    """An untrained router that uses both branches."""
    made = LinearRouter(model.config.num_hidden_layers, model.config.hidden_size, (Branch.SMALL, Branch.BIG)).eval()
    torch.nn.init.normal_(made.weight_LCD, generator=torch.Generator().manual_seed(3))
    return made


def greedy(model: DuoForCausalLM, ids: Tensor, **inputs: object) -> Tensor:
    """The most likely continuation, without a cache."""
    for _ in range(NEW):
        logits = model(ids, use_cache=False, **inputs).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids


@pytest.mark.parametrize("skip_scope", ["ffn", "layer"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
class TestCachedEqualsUncached:
    def test_greedy_with_a_route_for_all_tokens(self, skip_scope, attention):
        model, ids = tiny_model(skip_scope=skip_scope, attention=attention), random_ids()
        made = model.generate(ids, routes=ROUTE, max_new_tokens=NEW, do_sample=False)
        assert torch.equal(made, greedy(model, ids, routes=ROUTE))
        assert not torch.equal(made, greedy(model, ids))

    def test_greedy_with_an_attached_router(self, skip_scope, attention):
        model, ids = tiny_model(skip_scope=skip_scope, attention=attention), random_ids()
        model.attach(router(model))
        assert set(model(ids).routes.unique().tolist()) == {Branch.SMALL, Branch.BIG}
        assert torch.equal(model.generate(ids, max_new_tokens=NEW, do_sample=False), greedy(model, ids))

    def test_beams(self, skip_scope, attention):
        model, ids = tiny_model(skip_scope=skip_scope, attention=attention), random_ids()
        settings = {"routes": ROUTE, "max_new_tokens": NEW, "do_sample": False, "num_beams": 3}
        made = model.generate(ids, **settings)
        assert torch.equal(made, model.generate(ids, **settings, use_cache=False))
        assert torch.equal(made, torch.cat([model.generate(ids[row : row + 1], **settings) for row in range(2)]))

    def test_rows_of_a_left_padded_batch_are_those_generated_alone(self, skip_scope, attention):
        model, ids = tiny_model(skip_scope=skip_scope, attention=attention), random_ids()
        mask = torch.ones_like(ids)
        mask[0, :4] = 0
        settings = {"routes": ROUTE, "max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
        made = model.generate(ids, attention_mask=mask, **settings)
        assert torch.equal(made[:1, 4:], model.generate(ids[:1, 4:], **settings))
        assert torch.equal(made[1:], model.generate(ids[1:], **settings))


def test_logits_of_a_text_read_in_pieces_are_those_of_the_whole():
    model, ids = tiny_model(skip_scope="layer"), random_ids()
    first = model(ids[:, :4], routes=ROUTE, use_cache=True)
    second = model(ids[:, 4:], routes=ROUTE, past_key_values=first.past_key_values)
    pieces = torch.cat([first.logits, second.logits], dim=1)
    torch.testing.assert_close(pieces, model(ids, routes=ROUTE).logits, atol=1e-5, rtol=1e-5)


def test_several_samples_per_row_share_the_route():
    model, ids = tiny_model(), random_ids()
    made = model.generate(ids, routes=ROUTE, max_new_tokens=2, do_sample=True, num_return_sequences=3)
    assert made.shape == (6, 11)
