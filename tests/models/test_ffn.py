import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from duollm.models.ffn import can_fuse, fused_ffn
from tiny import random_ids, random_routes, tiny_model

FFNS = {
    "gated": {},
    "biases": {"mlp_bias": True},
    "plain": {"gated_ffn": False, "hidden_act": "relu", "mlp_bias": True},
}


@pytest.fixture
def make_ffn(monkeypatch):
    monkeypatch.setattr("duollm.models.ffn._WORTHWHILE", 0)
    return lambda **sizes: tiny_model(**sizes).model.layers[0].mlp.big


@pytest.mark.parametrize("shape", [(2,), (2, 3), (40,), (3, 1)], ids=str)
@pytest.mark.parametrize("sizes", FFNS.values(), ids=FFNS)
def test_fused_products_are_the_ffn(make_ffn, sizes, shape):
    ffn, states, residual = make_ffn(**sizes), torch.randn(*shape, 16), torch.randn(*shape, 16)
    for bias in (each.bias for each in (ffn.up_proj, ffn.down_proj) if each.bias is not None):
        nn.init.normal_(bias)
    expected = ffn(states).detach()  # with gradients: the plain form
    with torch.inference_mode():
        assert can_fuse(ffn, states)
        torch.testing.assert_close(fused_ffn(ffn, states), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ffn(states), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(fused_ffn(ffn, states, residual), expected + residual, atol=1e-5, rtol=1e-5)


class Doubled(nn.Linear):
    """An adapter in place of a linear map."""

    def forward(self, states):
        return 2 * super().forward(states)


class Halved(torch.Tensor):
    """A quantised weight: a tensor that multiplies in its own way."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs)
        return result / 2 if function is nn.functional.linear else result


class Doubling(TorchFunctionMode):
    """A mode that changes every linear map."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        return 2 * result if function is nn.functional.linear else result


def doubling(module, inputs, output):
    return 2 * output


def replaced(ffn):
    doubled = Doubled(24, 16, bias=False)
    doubled.weight = ffn.down_proj.weight
    ffn.down_proj = doubled


def forward_on_the_instance(ffn):
    ffn.down_proj.forward = lambda states: 2 * nn.functional.linear(states, ffn.down_proj.weight)


def parametrized(ffn):
    doubled = nn.Module()
    doubled.forward = lambda weight: 2 * weight
    nn.utils.parametrize.register_parametrization(ffn.down_proj, "weight", doubled, unsafe=True)


def another_forward(ffn):
    plain = ffn.forward
    ffn.forward = lambda states: 2 * plain(states)


def another_activation(ffn):
    plain = ffn.act_fn.forward
    ffn.act_fn.forward = lambda states: 2 * plain(states)


TOUCHES = {
    "module replaced": replaced,
    "forward of a projection": forward_on_the_instance,
    "forward of the FFN": another_forward,
    "forward of the activation": another_activation,
    "parametrization": parametrized,
    "hook on a projection": lambda ffn: ffn.up_proj.register_forward_hook(doubling),
    "hook before a projection": lambda ffn: ffn.down_proj.register_forward_pre_hook(lambda _, given: (2 * given[0],)),
    "hook on the FFN": lambda ffn: ffn.register_forward_hook(doubling),
    "hook on the activation": lambda ffn: ffn.act_fn.register_forward_hook(doubling),
}


@pytest.mark.parametrize("touch", TOUCHES.values(), ids=TOUCHES)
def test_what_others_put_on_a_part_has_its_effect(make_ffn, touch):
    ffn, states = make_ffn(), torch.randn(4, 16)
    with torch.inference_mode():
        plain = ffn.of_some(states)
        touch(ffn)
        torch.testing.assert_close(ffn.of_some(states), 2 * plain)
        torch.testing.assert_close(ffn.added_to(torch.ones(4, 16), states), 1 + 2 * plain)


def on_every_linear(module, inputs, output):
    return 2 * output if isinstance(module, nn.Linear) and module.out_features == 16 else output


def test_global_hooks_have_their_effect(make_ffn):
    ffn, states = make_ffn(), torch.randn(4, 16)
    with torch.inference_mode():
        plain = ffn.of_some(states)
        handle = nn.modules.module.register_module_forward_hook(on_every_linear)
        try:
            torch.testing.assert_close(ffn.of_some(states), 2 * plain)
        finally:
            handle.remove()


def test_functions_replaced_for_everybody_have_their_effect(make_ffn, monkeypatch):
    ffn, states, linear = make_ffn(gated_ffn=False, hidden_act="relu"), torch.randn(4, 16), nn.functional.linear
    with torch.inference_mode():
        plain = ffn.of_some(states)
        with Doubling():
            torch.testing.assert_close(ffn.of_some(states), 4 * plain)
        with monkeypatch.context() as patch:
            patch.setattr(nn.functional, "linear", lambda *given: 2 * linear(*given))
            torch.testing.assert_close(ffn.of_some(states), 4 * plain)
        with monkeypatch.context() as patch:
            patch.setattr(nn.Linear, "forward", lambda self, states: 3 * linear(states, self.weight, self.bias))
            torch.testing.assert_close(ffn.of_some(states), 9 * plain)
        with monkeypatch.context() as patch:
            patch.setattr(type(ffn), "forward", lambda self, states: 5 * states)
            torch.testing.assert_close(ffn.of_some(states), 5 * states)


def test_weights_that_multiply_in_their_own_way_do(make_ffn):
    ffn, states = make_ffn(), torch.randn(4, 16)
    with torch.inference_mode():
        plain = ffn.of_some(states)
        ffn.down_proj.weight = nn.Parameter(ffn.down_proj.weight.as_subclass(Halved), requires_grad=False)
        torch.testing.assert_close(ffn.of_some(states).as_subclass(torch.Tensor), plain / 2)


def test_what_has_no_fused_products_takes_the_plain_form(make_ffn):
    ffn = make_ffn()
    with torch.no_grad():
        assert not can_fuse(ffn.to(torch.bfloat16), torch.randn(4, 16))
        ffn.float().up_proj = nn.Sequential(ffn.up_proj)
        ffn.of_some(torch.randn(4, 16))
        assert ffn.to("meta").of_some(torch.randn(4, 16, device="meta")).is_meta
        with FakeTensorMode():
            assert make_ffn().of_some(torch.randn(4, 16)).shape == (4, 16)


def test_forward_derivatives_pass(make_ffn):
    ffn, states = make_ffn(), torch.randn(4, 16)
    expected = torch.func.jvp(ffn, (states,), (states,))
    with torch.no_grad():
        torch.testing.assert_close(torch.func.jvp(ffn.of_some, (states,), (states,)), expected)


def test_flops_are_counted(make_ffn):
    """Of a mixed route as of any other: a counter that does not know the fused products would see none."""
    model, ids, routes = tiny_model(), random_ids(), random_routes(lowest=1)
    make_ffn()
    counted = []
    for each in (routes, torch.full((3,), 1), torch.full((3,), 2)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(ids, routes=each)
        counted.append(counter.get_total_flops())
    mixed, small, big = counted
    share = (routes == 2).double().mean().item()
    assert mixed == pytest.approx(small + share * (big - small))
    assert big - small == 2 * ids.numel() * 3 * 3 * 16 * (24 - 6)


@pytest.mark.parametrize("context", [torch.enable_grad(), torch.autocast("cpu", torch.bfloat16)], ids=["grad", "bf16"])
def test_gradients_and_other_precisions_take_the_plain_form(make_ffn, context):
    ffn = make_ffn()
    with torch.no_grad(), context:
        assert not can_fuse(ffn, torch.randn(4, 16))


def test_one_row_and_little_work_take_the_plain_form():
    ffn = tiny_model().model.layers[0].mlp.big
    with torch.no_grad():
        assert not can_fuse(ffn, torch.randn(1, 1, 16))
        assert not can_fuse(ffn, torch.randn(4, 16))
        assert can_fuse(ffn, torch.randn(1 << 14, 16))
