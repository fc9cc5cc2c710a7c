"""torch.compile for training: what is compiled, when that pays, and what happens where it cannot be done.

Shape letters: B batch, T tokens.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from duollm.models.modeling_duo import DuoForCausalLM
from duollm.training.loop import LossFn
from duollm.training.next_token import Scorer, nll_and_gradient

_SECONDS, _SAVED = 30, 0.25
"""What compiling takes, and the share of the training that it saves (docs/LOG.md)."""
_RATES = {"cpu": 50e9, "cuda": 2e13}
"""FLOP/s of training without it, per thread on CPUs. Assumed: measured ones would differ when a run continues."""


def pays(flops: float, device: torch.device) -> tuple[bool, str]:
    """Whether compiling pays for a training of so many FLOPs, and why, in words."""
    rate = _RATES.get(device.type, _RATES["cpu"]) * (torch.get_num_threads() if device.type == "cpu" else 1)
    saved = _SAVED * flops / rate
    return saved > _SECONDS, f"compiling takes about {_SECONDS} s and would save about {saved:,.0f} s"


def compile_for_training(model: DuoForCausalLM, **options: Any) -> Scorer:
    """Compile the two halves of the layers, whose code all layers share; return the compiled loss of the head.

    Policies choose between the halves, so they stay ordinary Python.
    """
    settings = {"fullgraph": True, "dynamic": False, **options}
    for layer in model.model.layers:
        layer.attend, layer.branch = (torch.compile(half, **settings) for half in (layer.attend, layer.branch))
    scorer: Scorer = torch.compile(nll_and_gradient, **settings)
    return scorer


def plain_again(model: DuoForCausalLM) -> None:
    """Undo `compile_for_training`."""
    for layer in model.model.layers:
        vars(layer).pop("attend", None)
        vars(layer).pop("branch", None)


def why_it_fails(
    model: DuoForCausalLM, loss_fn: LossFn, batch_BT: Tensor, autocast: AbstractContextManager[Any]
) -> str:
    """Try compiled code with a forward and a backward pass; return in a line why it fails, or nothing."""
    try:
        with torch.random.fork_rng(), autocast:
            loss, _ = loss_fn(batch_BT, 0, 0)
        loss.backward()
    except Exception as error:  # compilers fail in every way; what fails without one as well, the training will raise
        return first_line(error)
    finally:
        model.zero_grad(set_to_none=True)
    return ""


def first_line(error: Exception) -> str:
    """What an error says, in a line; of a compiler's error, what stopped the compiler."""
    error = getattr(error, "inner_exception", error)
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
