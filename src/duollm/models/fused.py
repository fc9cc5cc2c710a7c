"""An FFN as fused products, as fast as a CPU allows; inference only.

PyTorch carries oneDNN's fused products (its compiler emits them), which fold activation, gating and residual into the
products without a pass over memory in between. They are also faster than the plain product (MKL's) for the few
rows that a branch often gets, above all for two or three; measured in docs/LOG.md.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

_NAMES: dict[type, str] = {nn.SiLU: "swish", SiLUActivation: "swish", nn.ReLU: "relu"}
_WORTHWHILE = 1 << 22  # multiplications, below which starting a fused product costs more than it saves


class FFN(Protocol):
    """What is fused: `DuoFFN`."""

    gate_proj: nn.Linear | None
    up_proj: nn.Linear
    down_proj: nn.Linear
    act_fn: nn.Module


def can_fuse(ffn: FFN, states: Tensor) -> bool:
    """Whether the fused products exist for this device, type and activation, pay off, and skip nobody's hook."""
    return (
        states.device.type == "cpu"
        and states.dtype == torch.float32
        and not torch.is_grad_enabled()
        and states.numel() > states.shape[-1]  # one row is as fast either way
        and states.numel() * ffn.up_proj.out_features >= _WORTHWHILE
        and type(ffn.act_fn) in _NAMES
        and all(map(_is_plain, (ffn.up_proj, ffn.down_proj, ffn.gate_proj or ffn.up_proj)))
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def fused_ffn(ffn: FFN, states: Tensor, residual: Tensor | None = None) -> Tensor:
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


def _is_plain(linear: nn.Module) -> bool:
    """Not replaced (by an adapter, a quantised layer) and not watched."""
    return (
        type(linear) is nn.Linear
        and linear.weight.dtype == torch.float32
        and not linear._forward_hooks
        and not linear._forward_pre_hooks
    )
