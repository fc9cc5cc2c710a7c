"""The feed-forward network, and the same as fused products: as fast as a CPU allows, for inference only.

PyTorch carries oneDNN's fused products (its compiler emits them), which fold activation, gating and residual into the
products without a pass over memory in between. They are also faster than the plain product (MKL's) for the few
rows that a branch often gets, above all for two or three; measured in docs/LOG.md.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from transformers.activations import ACT2FN, SiLUActivation

from .configuration_duo import DuoConfig

_NAMES: dict[type, str] = {nn.SiLU: "swish", SiLUActivation: "swish", nn.ReLU: "relu"}
_PLAIN: dict[type, Any] = {plain: plain.forward for plain in (nn.Linear, nn.SiLU, SiLUActivation, nn.ReLU)}
"""The modules that a fused product stands for, and their `forward`; somebody may put another in its place."""

_RECORDER = "transformers.utils.output_capturing"
_LINEAR = nn.functional.linear
_WORTHWHILE = 1 << 22  # multiplications, below which starting a fused product costs more than it saves


class DuoFFN(nn.Module):
    """One feed-forward network: gated (SwiGLU) or plain, as the configuration says; `linear`: down(up(x)) + b."""

    def __init__(self, config: DuoConfig, intermediate_size: int, linear: bool = False) -> None:
        super().__init__()
        width, bias = config.hidden_size, config.mlp_bias and not linear
        gated = config.gated_ffn and not linear
        self.gate_proj = nn.Linear(width, intermediate_size, bias=bias) if gated else None
        self.up_proj = nn.Linear(width, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, width, bias=bias or linear)
        self.act_fn = nn.Identity() if linear else ACT2FN[config.hidden_act]

    def forward(self, states: Tensor) -> Tensor:
        """Map [..., D] to [..., D]."""
        if self.gate_proj is None:
            return self.down_proj(self.act_fn(self.up_proj(states)))
        return self.down_proj(self.act_fn(self.gate_proj(states)) * self.up_proj(states))

    def of_some(self, states_ND: Tensor) -> Tensor:
        """As `forward` for a part of the tokens: fused products, which are faster there but round differently."""
        return fused_ffn(self, states_ND) if can_fuse(self, states_ND) else self(states_ND)

    def added_to(self, residual: Tensor, states: Tensor) -> Tensor:
        """Return residual + forward(states), both [..., D]: fused products, which are faster but round differently."""
        if can_fuse(self, states) and type(residual) is Tensor and residual.dtype == states.dtype:
            return fused_ffn(self, states, residual)
        return residual + self(states)


_FORWARD = DuoFFN.forward


def can_fuse(ffn: DuoFFN, states: Tensor) -> bool:
    """Whether the fused products exist for this device, type and activation, pay off, and bypass nobody."""
    return (
        states.device.type == "cpu"
        and states.dtype == torch.float32
        and not torch.is_grad_enabled()
        and states.numel() > states.shape[-1]  # one row is as fast either way
        and not torch.compiler.is_compiling()
        and type(ffn.act_fn) in _NAMES
        and states.numel() * getattr(ffn.up_proj, "out_features", 0) >= _WORTHWHILE  # cheap, so before what is not
        and _is_own(ffn)
        and type(states) is Tensor
        and not torch.is_autocast_enabled("cpu")
        and nobody_watches()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def fused_ffn(ffn: DuoFFN, states: Tensor, residual: Tensor | None = None) -> Tensor:
    """Return ffn(states), [..., D], plus the residual [..., D] if there is one."""
    linear: Any = torch.ops.mkldnn._linear_pointwise
    gate, up, down, activation = ffn.gate_proj, ffn.up_proj, ffn.down_proj, _NAMES[type(ffn.act_fn)]
    if gate is None:
        inner = linear(states, up.weight, up.bias, activation, [], "")
    else:
        gated = linear(states, gate.weight, gate.bias, activation, [], "")
        inner = linear.binary(states, gated, up.weight, up.bias, "mul")
    if residual is None:
        return linear(inner, down.weight, down.bias, "none", [], "")
    return linear.binary(inner, residual, down.weight, down.bias, "add")


def is_plain(given: Any) -> bool:
    """Whether a module is torch's own and untouched, so that its weights alone say what it computes.

    Adapters and quantised layers replace the module, offloading its `forward` or its weights, and hooks may
    change what comes out.
    """
    return (
        type(given) in _PLAIN
        and type(given).forward is _PLAIN[type(given)]
        and not is_watched(given)
        and all(type(weight) in (nn.Parameter, Tensor) and not weight.is_meta for weight in _weights(given))
    )


def is_watched(given: nn.Module) -> bool:
    """Whether a hook, or a `forward` of its own, is on this very module; what transformers records by is no matter."""
    kinds = (given._forward_hooks, given._forward_pre_hooks, given._backward_hooks, given._backward_pre_hooks)
    hooks: list[Any] = [hook for kind in kinds for hook in kind.values()]
    return any(getattr(hook, "__module__", None) != _RECORDER for hook in hooks) or "forward" in vars(given)


def _is_own(ffn: DuoFFN) -> bool:
    """Whether the FFN is ours, its parts are torch's in float32, and nobody has touched any of them."""
    parts = (ffn.up_proj, ffn.down_proj, ffn.act_fn, ffn.gate_proj or ffn.up_proj)
    return (
        type(ffn).forward is _FORWARD
        and not is_watched(ffn)
        and all(map(is_plain, parts))
        and all(part._compiled_call_impl is None for part in (ffn, *parts))
        and all(_is_float32(weight) for part in parts for weight in _weights(part))
    )


def _weights(given: nn.Module) -> list[Tensor]:
    return [weight for weight in given._parameters.values() if weight is not None]


def _is_float32(weight: Tensor) -> bool:
    return weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.layout == torch.strided


def nobody_watches() -> bool:
    """Whether operations are called as they are: by no mode, no transform and no patched function."""
    modes = [mode for mode in _get_current_function_mode_stack() if type(mode) is not DeviceContext]
    return (
        not module._has_any_global_hook()
        and not modes
        and not _get_current_dispatch_mode_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and nn.functional.linear is _LINEAR
    )
