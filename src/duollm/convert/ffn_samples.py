"""What the FFNs of a duo see on sample text when all layers are big.

Shape letters: W windows, B windows per forward, T tokens, N = W * T, L layers, D hidden.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from duollm.machine import Precision
from duollm.models.modeling_duo import DuoForCausalLM

_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class FFNSamples:
    """Inputs of all FFNs, and how much an error of their outputs matters.

    Attributes:
        states_LND: what enters each FFN, bfloat16.
        weights_LN: 1 / mean square of the residual stream once the big FFN's output is added. The next
            layer normalises that stream, so an error counts relative to its size; without the weights the
            few tokens whose stream is a hundred times as large would decide alone.
    """

    states_LND: Tensor
    weights_LN: Tensor


@contextmanager
def sample_ffns(model: DuoForCausalLM, sample_WT: Tensor, precision: Precision) -> Iterator[FFNSamples]:
    """Run token ids [W, T] through the model, all big, and yield what its FFNs saw.

    The inputs are in a file, 2 * L * N * D bytes, that is mapped into memory and goes with the context.
    """
    shape = model.config.num_hidden_layers, sample_WT.numel(), model.config.hidden_size
    with tempfile.TemporaryDirectory(prefix="duollm-") as folder:
        size = shape[0] * shape[1] * shape[2]
        flat = torch.from_file(str(Path(folder, "states")), shared=True, size=size, dtype=torch.bfloat16)
        samples = FFNSamples(flat.view(shape), torch.empty(shape[:2]))
        start = 0
        for batch_BT in sample_WT.split(max(1, _BATCH_TOKENS // sample_WT.shape[1])):
            end = start + batch_BT.numel()
            _run(model, batch_BT, precision, samples.states_LND[:, start:end], samples.weights_LN[:, start:end])
            start = end
        yield samples


@torch.inference_mode()
def _run(model: DuoForCausalLM, batch_BT: Tensor, precision: Precision, states_LND: Tensor, weights_LN: Tensor) -> None:
    """Forward one batch and write what the FFNs saw."""
    device = model.device
    with ExitStack() as hooks, torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        for layer, states_ND, weights_N in zip(model.model.layers, states_LND, weights_LN, strict=True):
            hooks.enter_context(layer.mlp.register_forward_pre_hook(_note_states(states_ND)))
            hooks.enter_context(layer.register_forward_hook(_note_weights(weights_N)))
        model.model(input_ids=batch_BT.to(device), use_cache=False)


def _note_states(states_ND: Tensor) -> Callable[[nn.Module, Any], None]:
    def note(mlp: nn.Module, given: Any) -> None:
        states_ND.copy_(given[0].flatten(0, 1))

    return note


def _note_weights(weights_N: Tensor) -> Callable[[nn.Module, Any, Any], None]:
    def note(layer: nn.Module, given: Any, returned: Any) -> None:
        stream_ND = returned[0].flatten(0, 1).float()
        weights_N.copy_(1 / stream_ND.square().mean(-1).clamp(min=torch.finfo(torch.float32).tiny))

    return note
