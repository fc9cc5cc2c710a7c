"""Whole graphs, exported programs, and tensors without values."""

import pytest
import torch
from torch._dynamo.exc import UserError
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.llama.modeling_llama import repeat_kv

from duollm.models.modeling_duo import DuoForCausalLM
from duollm.models.policy import FixedRoutes
from duollm.routers.policies import RandomShare
from tiny import random_ids, random_routes, tiny_config, tiny_model

KINDS = {
    "layer, sliding": {"skip_scope": "layer", "sliding_window": 4},
    "learned positions": {"positions": "learned", "norm": "layer", "gated_ffn": False, "max_position_embeddings": 32},
}


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def kind(request):
    return request.param


def whole_graph(model: DuoForCausalLM):
    torch.compiler.reset()
    return torch.compile(model, backend="eager", fullgraph=True)


def test_all_big_is_one_graph(kind):
    model, ids = tiny_model(attention="sdpa", **kind), random_ids()
    mask = torch.ones_like(ids)
    compiled = whole_graph(model)
    torch.testing.assert_close(compiled(ids).logits, model(ids).logits)
    loss = compiled(ids, attention_mask=mask, labels=ids).loss
    torch.testing.assert_close(loss, model(ids, labels=ids).loss)


ROUTED = {
    "one branch a layer": {"policy": FixedRoutes(torch.tensor([1, 0, 2]))},
    "routes in reference execution": {"routes": random_routes(), "execution": "reference"},
    "a route in reference execution": {"routes": torch.tensor([1, 0, 2]), "execution": "reference"},
    "a router in reference execution": {"policy": RandomShare(0.5), "execution": "reference"},
}


@pytest.mark.parametrize("given", ROUTED.values(), ids=ROUTED.keys())
def test_these_routes_are_one_graph(given):
    model, ids = tiny_model(attention="sdpa", skip_scope="layer"), random_ids()
    expected, traced = model(ids, **given), whole_graph(model)(ids, **given)
    torch.testing.assert_close(traced.logits, expected.logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(traced.routes, expected.routes)


class RepeatedHeads(torch.nn.Module):
    """What every model with grouped-query attention does in transformers."""

    def forward(self, states):
        return repeat_kv(states, 2)


def test_all_big_is_exported_for_any_batch_and_length(kind):
    model, ids = tiny_model(attention="sdpa", **kind), random_ids()
    batch, time = torch.export.Dim("batch", min=2, max=8), torch.export.Dim("time", min=2, max=32)
    sizes = {0: batch, 1: time}
    try:
        program = torch.export.export(
            model,
            (),
            {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False},
            dynamic_shapes={"input_ids": sizes, "attention_mask": sizes, "use_cache": None},
        )
    except UserError:
        with pytest.raises(UserError):
            torch.export.export(RepeatedHeads(), (torch.ones(2, 2, 9, 4),), dynamic_shapes=({0: batch, 2: time},))
        pytest.skip("this torch exports no grouped-query attention for any length")
    other = random_ids(3, 6)
    output = program.module()(input_ids=other, attention_mask=torch.ones_like(other), use_cache=False)
    torch.testing.assert_close(output.logits, model(other).logits, atol=1e-5, rtol=1e-5)


def test_a_model_without_values_runs(kind):
    config = tiny_config(**kind)
    with torch.device("meta"):
        output = DuoForCausalLM(config)(torch.zeros(2, 9, dtype=torch.long))
    assert output.logits.is_meta
    assert output.logits.shape == (2, 9, 31)
    with FakeTensorMode():
        assert DuoForCausalLM(config).eval()(torch.zeros(2, 9, dtype=torch.long)).routes.shape == (2, 9, 3)
