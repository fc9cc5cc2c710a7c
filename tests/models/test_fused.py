import pytest
import torch
from torch import nn

from duollm.models import fused
from tiny import tiny_model

FFNS = {
    "gated": {},
    "biases": {"mlp_bias": True},
    "plain": {"gated_ffn": False, "hidden_act": "relu", "mlp_bias": True},
}


@pytest.fixture
def make_ffn(monkeypatch):
    monkeypatch.setattr(fused, "_WORTHWHILE", 0)
    return lambda **sizes: tiny_model(**sizes).model.layers[0].mlp.big


@pytest.mark.parametrize("shape", [(2,), (2, 3), (40,), (3, 1)], ids=str)
@pytest.mark.parametrize("sizes", FFNS.values(), ids=FFNS)
def test_fused_products_are_the_ffn(make_ffn, sizes, shape):
    ffn, states, residual = make_ffn(**sizes), torch.randn(*shape, 16), torch.randn(*shape, 16)
    for bias in (each.bias for each in (ffn.up_proj, ffn.down_proj) if each.bias is not None):
        nn.init.normal_(bias)
    expected = ffn(states).detach()  # with gradients: the plain form
    with torch.inference_mode():
        assert fused.can_fuse(ffn, states)
        torch.testing.assert_close(fused.fused_ffn(ffn, states), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ffn(states), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(fused.fused_ffn(ffn, states, residual), expected + residual, atol=1e-5, rtol=1e-5)


class Doubled(nn.Linear):
    """An adapter in place of a linear map."""

    def forward(self, states):
        return 2 * super().forward(states)


def test_whoever_watches_or_replaces_a_product_is_not_passed_over(make_ffn):
    ffn, states, seen = make_ffn(), torch.randn(4, 16), []
    with torch.inference_mode():
        plain = ffn(states)
        handle = ffn.gate_proj.register_forward_hook(lambda *_: seen.append(1))
        ffn(states)
        handle.remove()
        assert seen == [1]
        doubled = Doubled(24, 16, bias=False)
        doubled.weight = ffn.down_proj.weight
        ffn.down_proj = doubled
        torch.testing.assert_close(ffn(states), 2 * plain)


@pytest.mark.parametrize("context", [torch.enable_grad(), torch.autocast("cpu", torch.bfloat16)], ids=["grad", "bf16"])
def test_gradients_and_other_precisions_take_the_plain_form(make_ffn, context):
    ffn = make_ffn()
    with torch.no_grad(), context:
        assert not fused.can_fuse(ffn, torch.randn(4, 16))


def test_one_row_and_little_work_take_the_plain_form():
    ffn = tiny_model().model.layers[0].mlp.big
    with torch.no_grad():
        assert not fused.can_fuse(ffn, torch.randn(1, 1, 16))
        assert not fused.can_fuse(ffn, torch.randn(4, 16))
        assert fused.can_fuse(ffn, torch.randn(1 << 14, 16))
