"""Makes the small FFNs of a converted duo: cuts them out of the big ones and fits them on sample text.

Shape letters: W windows, B windows per forward, T tokens, N = W * T sample tokens, L layers, D hidden, F inner width of
the big FFN, S of the small one, R rank of a linear one.
"""

import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from duollm.config import SmallInit
from duollm.errors import UserError
from duollm.machine import Precision, autocast, faster_precision
from duollm.models.ffn import DuoFFN
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.ridge import ridge
from duollm.routes.sampling import derived_seed

_BATCH_TOKENS = 2048
_HELD_OUT_SHARE = 0.125
_STEP_TOKENS, _LEARNING_RATE = 1024, 0.03
_PART = 2048  # tokens whose inner states, or states in double precision, are held at once
_RIDGE = 1e-3  # of the mean square of an input of the regression


@dataclass(frozen=True)
class Examples:
    """Inputs and outputs of one big FFN on sample tokens, float32.

    Attributes:
        states_ND, outputs_ND: inputs and outputs of the FFN.
        weights_N: how much a squared error of each token counts; their mean over all tokens is 1.
    """

    states_ND: Tensor
    outputs_ND: Tensor
    weights_N: Tensor

    def rows(self, index: Tensor | slice) -> "Examples":
        """Return the examples of some of the tokens."""
        return Examples(self.states_ND[index], self.outputs_ND[index], self.weights_N[index])

    def parts(self) -> Iterator["Examples"]:
        """Yield the examples a few at a time, so that the inner states of all tokens never take memory at once."""
        for start in range(0, len(self.weights_N), _PART):
            yield self.rows(slice(start, start + _PART))

    def variance(self) -> Tensor:
        """Weighted mean squared distance of the outputs from their weighted mean."""
        mean_D = self.weights_N @ self.outputs_ND / self.weights_N.sum()
        return (self.weights_N * (self.outputs_ND - mean_D).square().sum(-1)).mean()

    def error(self, ffn: DuoFFN) -> Tensor:
        """Weighted mean squared distance of the outputs from those of `ffn`."""
        return (self.weights_N * (ffn(self.states_ND).float() - self.outputs_ND).square().sum(-1)).mean()

    @torch.no_grad()
    def explained_by(self, ffn: DuoFFN) -> float:
        """Share of the outputs' variance that `ffn` explains: 1 - error / variance."""
        return 1 - (self.error(ffn) / self.variance()).item()


def initialise_small_ffns(
    model: DuoForCausalLM,
    how: SmallInit,
    sample_WT: Tensor,
    seed: int = 0,
    steps: int = 300,
    progress: Callable[[str], None] = lambda line: None,
) -> list[float]:
    """Derive the small FFNs of `model` from its big ones. Nothing else changes.

    Args:
        how: "random" leaves them as they are. "slice" takes the big FFN's neurons with the largest expected
            output on the sample and solves for the output matrix that makes up best for the others (ridge
            regression). "distilled" starts there and trains all of the small FFN by gradient descent. "linear"
            puts a linear map of rank `small_intermediate_size` in its place, fitted in closed form. "mean" puts the
            big FFN's mean output there, as the bias of such a map of rank 1 whose weights are zero.
        sample_WT: token ids [W, T] of two windows or more.
        seed: random seed of the distillation's batches.
        steps: distillation steps per layer.
        progress: is called with each layer's result and the time left.

    Returns:
        Per layer, the share of the big FFN's output variance that the small one explains, on an eighth of the
        windows that it was not fitted to (negative: worse than the mean output). Empty if `how` is random.

    Raises:
        UserError: `how` is linear and the rank exceeds the width of the model.
    """
    if how == "random":
        return []
    if how == "mean":
        model.config.small_intermediate_size = 1
    if how in _CLOSED_FORMS:
        make_linear(model)
    precision = faster_precision()
    held_out = sample_WT.shape[1] * max(1, round(_HELD_OUT_SHARE * len(sample_WT)))
    fitted, layers = sample_WT.numel() - held_out, model.config.num_hidden_layers
    explained: list[float] = []
    progress(f"running {sample_WT.numel():,} tokens of sample text through the model")
    with sample_ffns(model, sample_WT, precision) as (states_LND, weights_LN):
        start = time.perf_counter()
        for layer, states_ND, weights_N in zip(model.model.layers, states_LND, weights_LN, strict=True):
            examples, energies_F = _examples(layer.mlp.big, states_ND, weights_N, precision)
            small, known = deepcopy(layer.mlp.small).float(), examples.rows(slice(fitted))
            if how in _CLOSED_FORMS:
                _CLOSED_FORMS[how](small, known)
            else:
                cut_out(small, layer.mlp.big, energies_F, known)
            if how == "distilled":
                generator = torch.Generator().manual_seed(derived_seed(seed, len(explained)))
                distil(small, known, steps, generator, precision)
            layer.mlp.small.load_state_dict(small.state_dict())
            explained.append(examples.rows(slice(fitted, None)).explained_by(small))
            left = (time.perf_counter() - start) / len(explained) * (layers - len(explained))
            progress(
                f"small FFN of layer {len(explained)}/{layers}: explains {explained[-1]:.0%} of the "
                f"variance of the big one's output  ETA {int(left // 60)}:{int(left % 60):02d}"
            )
    return explained


@torch.no_grad()
def cut_out(small: DuoFFN, big: DuoFFN, energies_F: Tensor, examples: Examples) -> None:
    """Copy the neurons of `big` with the largest energy into `small`, and fit its output matrix to the examples."""
    neurons_S = energies_F.topk(small.up_proj.out_features).indices.sort().values
    for into, out_of in ((small.gate_proj, big.gate_proj), (small.up_proj, big.up_proj)):
        if into is not None and out_of is not None:
            into.weight.copy_(out_of.weight[neurons_S])
            if into.bias is not None:
                into.bias.copy_(out_of.bias[neurons_S])
    small.down_proj.weight.copy_(big.down_proj.weight[:, neurons_S])
    bias = small.down_proj.bias
    if bias is not None:
        bias.copy_(big.down_proj.bias)

    def errors() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for part in examples.parts():
            neurons_NS = _neurons(small, part.states_ND)
            errors_ND = part.outputs_ND - small.down_proj(neurons_NS)
            if bias is not None:
                neurons_NS = nn.functional.pad(neurons_NS, (0, 1), value=1.0)
            yield neurons_NS, errors_ND, part.weights_N

    added_SD = _regress(errors(), held=len(neurons_S))[0].float()
    small.down_proj.weight.add_(added_SD[: len(neurons_S)].T)
    if bias is not None:
        bias.add_(added_SD[-1])


def distil(small: DuoFFN, examples: Examples, steps: int, generator: torch.Generator, precision: Precision) -> None:
    """Minimise the error of `small` on the examples, relative to their variance, by Adam with a cosine schedule.

    The learning rate is relative to the root mean square of the weights, so that one value serves all sizes.
    """
    size = nn.utils.parameters_to_vector(small.parameters()).square().mean().sqrt().item()
    optimizer = torch.optim.Adam(small.parameters())
    variance, tokens, device = examples.variance(), len(examples.weights_N), examples.weights_N.device
    for step in range(steps):
        warmed_up = min(1.0, (step + 1) / (0.05 * steps))
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = size * _LEARNING_RATE * warmed_up * (0.05 + 0.95 * cosine)
        batch = examples.rows(torch.randint(tokens, (_STEP_TOKENS,), generator=generator).to(device))
        with autocast(device, precision):
            loss = batch.error(small) / variance
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def _examples(big: DuoFFN, states_ND: Tensor, weights_N: Tensor, precision: Precision) -> tuple[Examples, Tensor]:
    """Run the big FFN; also return the expected square of what each of its neurons adds to the output, [F]."""
    device = big.down_proj.weight.device
    states_ND, weights_N = states_ND.to(device, torch.float32), (weights_N / weights_N.mean()).to(device)
    outputs, squares_F = [], torch.zeros(big.down_proj.in_features, device=device)
    for part_ND, part_N in zip(states_ND.split(_PART), weights_N.split(_PART), strict=True):
        with autocast(device, precision):
            neurons_NF = _neurons(big, part_ND.to(big.down_proj.weight.dtype))
            outputs.append(big.down_proj(neurons_NF).float())
        squares_F += part_N @ neurons_NF.float().square()
    columns_F = big.down_proj.weight.float().square().sum(0)
    return Examples(states_ND, torch.cat(outputs), weights_N), squares_F * columns_F


def _regress(rows: Iterable[tuple[Tensor, Tensor, Tensor]], held: int) -> tuple[Tensor, Tensor]:
    """Ridge regression of rows (inputs [N, F], targets [N, C], weights [N]): its weights and X'Y, both [F, C]."""
    product_FF = aimed_FC = torch.zeros(())
    for inputs_NF, targets_NC, weights_N in rows:
        weighted_FN = (inputs_NF * weights_N[:, None]).T
        product_FF = product_FF + (weighted_FN @ inputs_NF).double()
        aimed_FC = aimed_FC + (weighted_FN @ targets_NC).double()
    return ridge(product_FF, aimed_FC, _RIDGE, held), aimed_FC


def _neurons(ffn: DuoFFN, states_ND: Tensor) -> Tensor:
    """What the output matrix is applied to, [N, F]."""
    up_NF = ffn.up_proj(states_ND)
    return ffn.act_fn(up_NF) if ffn.gate_proj is None else ffn.act_fn(ffn.gate_proj(states_ND)) * up_NF


@contextmanager
def sample_ffns(model: DuoForCausalLM, sample_WT: Tensor, precision: Precision) -> Iterator[tuple[Tensor, Tensor]]:
    """Run token ids [W, T] through the model, all big, and yield the inputs of its FFNs.

    The inputs lie in a temporary file of 2 * L * N * D bytes, mapped into memory. It is removed with the context.

    Yields:
        what enters each FFN, bfloat16 [L, N, D]; and weights [L, N], by how much an error of its output matters:
        1 / mean square of the residual stream once the big FFN's output is added. The next layer normalises that
        stream, so an error counts relative to its size; without the weights the few tokens whose stream is a hundred
        times as large would decide alone.
    """

    def note_states(states_ND: Tensor, mlp: nn.Module, given: Any) -> None:
        states_ND.copy_(given[0].flatten(0, 1))

    def note_weights(weights_N: Tensor, layer: nn.Module, given: Any, returned: Any) -> None:
        stream_ND = returned[0].flatten(0, 1).float()
        weights_N.copy_(1 / stream_ND.square().mean(-1).clamp(min=torch.finfo(torch.float32).tiny))

    shape = model.config.num_hidden_layers, sample_WT.numel(), model.config.hidden_size
    with tempfile.TemporaryDirectory(prefix="duollm-") as folder:
        file = str(Path(folder, "states"))
        states_LND = torch.from_file(file, shared=True, size=math.prod(shape), dtype=torch.bfloat16).view(shape)
        weights_LN, done, device = torch.empty(shape[:2]), 0, model.device
        for batch_BT in sample_WT.split(max(1, _BATCH_TOKENS // sample_WT.shape[1])):
            here = slice(done, done + batch_BT.numel())
            with ExitStack() as hooks, torch.inference_mode(), autocast(device, precision):
                for layer, *kept in zip(model.model.layers, states_LND[:, here], weights_LN[:, here], strict=True):
                    hooks.enter_context(layer.mlp.register_forward_pre_hook(partial(note_states, kept[0])))
                    hooks.enter_context(layer.register_forward_hook(partial(note_weights, kept[1])))
                model.model(input_ids=batch_BT.to(device), use_cache=False)
            done = here.stop
        yield states_LND, weights_LN


def make_linear(model: DuoForCausalLM) -> None:
    """Replace the small FFNs by linear maps of rank `small_intermediate_size`, with a bias on the output.

    Raises:
        UserError: the rank exceeds the width of the model.
    """
    config = model.config
    if config.small_intermediate_size > config.hidden_size:
        raise UserError(
            f"small_intermediate_size ({config.small_intermediate_size}) is the rank of a linear map with small_init "
            f"linear and must not exceed the model's hidden_size ({config.hidden_size}); give a smaller one"
        )
    config.small_linear = True
    config.base_model_tp_plan = config._tp_plan()  # type: ignore[misc]
    for layer in model.model.layers:
        like = layer.mlp.big.down_proj.weight
        layer.mlp.small = DuoFFN(config, config.small_intermediate_size, linear=True).to(like.device, like.dtype)


@torch.no_grad()
def fit_mean(small: DuoFFN, examples: Examples) -> None:
    """Set the map to the weighted mean of the outputs, whatever its input."""
    small.up_proj.weight.zero_()
    small.down_proj.weight.zero_()
    small.down_proj.bias.copy_(examples.weights_N @ examples.outputs_ND / examples.weights_N.sum())


@torch.no_grad()
def fit_linear(small: DuoFFN, examples: Examples) -> None:
    """Set the map to the one of its rank that predicts the outputs best: a reduced-rank ridge regression.

    Of the full regression's predictions it keeps the R directions of the output in which they vary most (Izenman,
    1975). So with any rank it gives the mean output for the mean input.
    """
    total = examples.weights_N.sum().double()
    given_ND = examples.states_ND, examples.outputs_ND
    states_D, outputs_D = ((examples.weights_N @ each_ND).double() / total for each_ND in given_ND)
    centred = (
        (p.states_ND.double() - states_D, p.outputs_ND.double() - outputs_D, p.weights_N) for p in examples.parts()
    )
    full_DD, aimed_DD = _regress(centred, held=len(states_D))
    varied_DD = aimed_DD.T @ full_DD
    directions_DD = torch.linalg.eigh((varied_DD + varied_DD.T) / 2).eigenvectors  # ascending eigenvalues
    kept_DR = directions_DD[:, -small.up_proj.out_features :]
    small.up_proj.weight.copy_((full_DD @ kept_DR).T)
    small.down_proj.weight.copy_(kept_DR)
    small.down_proj.bias.copy_(outputs_D - states_D @ full_DD @ kept_DR @ kept_DR.T)


_CLOSED_FORMS: dict[str, Callable[[DuoFFN, Examples], None]] = {"linear": fit_linear, "mean": fit_mean}
