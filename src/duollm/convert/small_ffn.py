"""Small FFNs of a converted duo: cut out of its big ones, and fitted to them on sample text.

Shape letters: N sample tokens, W windows, T tokens, D hidden, F inner width of the big FFN, S of the small one.
"""

import math
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from duollm.convert.ffn_samples import sample_ffns
from duollm.machine import Precision, faster_precision
from duollm.models.modeling_duo import DuoFFN, DuoForCausalLM
from duollm.routes.sampling import derived_seed

SmallInit = Literal["random", "slice", "distilled"]

_HELD_OUT_SHARE = 0.125
_PART = 2048  # tokens whose inner states are held at once
_RIDGE = 1e-3  # of the mean squared activation


@dataclass(frozen=True)
class Distillation:
    """How a small FFN is regressed on its big one, layer by layer: by Adam, its rate falling along a cosine.

    Attributes:
        steps, batch_tokens: how many steps of how many tokens.
        learning_rate: at the start, relative to the weights (root mean square), so that one value serves all sizes.
    """

    steps: int = 300
    batch_tokens: int = 1024
    learning_rate: float = 0.03


@dataclass(frozen=True)
class Examples:
    """Inputs and outputs of one big FFN on sample tokens, float32.

    Attributes:
        states_ND, outputs_ND: what enters and what leaves it.
        weights_N: how much a squared error of each token counts; their mean over all tokens is 1.
    """

    states_ND: Tensor
    outputs_ND: Tensor
    weights_N: Tensor

    def rows(self, index: Tensor | slice) -> "Examples":
        """Some of the tokens."""
        return Examples(self.states_ND[index], self.outputs_ND[index], self.weights_N[index])

    def variance(self) -> Tensor:
        """Weighted mean squared distance of the outputs from their weighted mean."""
        mean_D = self.weights_N @ self.outputs_ND / self.weights_N.sum()
        return (self.weights_N * (self.outputs_ND - mean_D).square().sum(-1)).mean()

    def error(self, ffn: DuoFFN) -> Tensor:
        """Weighted mean squared distance of the outputs from those of `ffn`."""
        return (self.weights_N * (ffn(self.states_ND).float() - self.outputs_ND).square().sum(-1)).mean()


def initialise_small_ffns(
    model: DuoForCausalLM,
    how: SmallInit,
    sample_WT: Tensor,
    seed: int = 0,
    distillation: Distillation | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> list[float]:
    """Set the small FFNs of `model` from its big ones; nothing else changes.

    Args:
        how: "random" leaves them as they are. "slice" takes the big FFN's neurons with the largest expected
            output on the sample and solves for the output matrix that makes up best for the others (ridge
            regression). "distilled" starts there and trains all of the small FFN by gradient descent.
        sample_WT: token ids [W, T].
        seed: of the batches of the distillation.
        distillation: its settings; default `Distillation()`.
        progress: told each layer's result, with the time left.

    Returns:
        Per layer, the share of the big FFN's output variance that the small one explains, on an eighth of the
        windows that it was not fitted to (negative: worse than the mean output). Empty if `how` is random.

    Raises:
        ValueError: fewer than two windows, or a small FFN wider than the big one.
    """
    if how == "random":
        return []
    config = model.config
    if len(sample_WT) < 2 or config.small_intermediate_size > config.intermediate_size:
        raise ValueError(
            f"needs two windows of text or more (got {len(sample_WT)}) and small FFNs no wider than the big ones "
            f"(got {config.small_intermediate_size} and {config.intermediate_size})"
        )
    precision, settings = faster_precision(), distillation or Distillation()
    held_out = sample_WT.shape[1] * max(1, round(_HELD_OUT_SHARE * len(sample_WT)))
    fitted = sample_WT.numel() - held_out
    explained: list[float] = []
    progress(f"running {sample_WT.numel():,} tokens of sample text through the model")
    with sample_ffns(model, sample_WT, precision) as samples:
        start = time.perf_counter()
        for layer, states_ND, weights_N in zip(model.model.layers, samples.states_LND, samples.weights_LN, strict=True):
            examples, energies_F = _examples(layer.mlp.big, states_ND, weights_N, precision)
            small = deepcopy(layer.mlp.small).float()
            cut_out(small, layer.mlp.big, energies_F, examples.rows(slice(fitted)))
            if how == "distilled":
                generator = torch.Generator().manual_seed(derived_seed(seed, len(explained)))
                distil(small, examples.rows(slice(fitted)), settings, generator, precision)
            layer.mlp.small.load_state_dict(small.state_dict())
            explained.append(explained_variance(small, examples.rows(slice(fitted, None))))
            progress(_report(explained, config.num_hidden_layers, time.perf_counter() - start))
    return explained


@torch.no_grad()
def explained_variance(ffn: DuoFFN, examples: Examples) -> float:
    """Share of the outputs' weighted variance that `ffn` explains: 1 - error / variance."""
    return 1 - (examples.error(ffn) / examples.variance()).item()


@torch.no_grad()
def cut_out(small: DuoFFN, big: DuoFFN, energies_F: Tensor, examples: Examples) -> None:
    """Give `small` the neurons of `big` with the largest energy, and the output matrix that fits the examples best."""
    neurons_S = energies_F.topk(small.up_proj.out_features).indices.sort().values
    for into, out_of in ((small.gate_proj, big.gate_proj), (small.up_proj, big.up_proj)):
        if into is not None and out_of is not None:
            into.weight.copy_(out_of.weight[neurons_S])
            if into.bias is not None:
                into.bias.copy_(out_of.bias[neurons_S])
    small.down_proj.weight.copy_(big.down_proj.weight[:, neurons_S])
    if small.down_proj.bias is not None:
        small.down_proj.bias.copy_(big.down_proj.bias)
    _correct_output(small, examples)


def distil(
    small: DuoFFN, examples: Examples, settings: Distillation, generator: torch.Generator, precision: Precision
) -> None:
    """Minimise the error of `small` on the examples, relative to their variance."""
    size = nn.utils.parameters_to_vector(small.parameters()).square().mean().sqrt().item()
    optimizer = torch.optim.Adam(small.parameters())
    variance, tokens, device = examples.variance(), len(examples.weights_N), examples.weights_N.device
    for step in range(settings.steps):
        warmed_up = min(1.0, (step + 1) / (0.05 * settings.steps))
        cosine = 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        optimizer.param_groups[0]["lr"] = size * settings.learning_rate * warmed_up * (0.05 + 0.95 * cosine)
        batch = examples.rows(torch.randint(tokens, (settings.batch_tokens,), generator=generator).to(device))
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
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
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            neurons_NF = _neurons(big, part_ND.to(big.down_proj.weight.dtype))
            outputs.append(big.down_proj(neurons_NF).float())
        squares_F += part_N @ neurons_NF.float().square()
    columns_F = big.down_proj.weight.float().square().sum(0)
    return Examples(states_ND, torch.cat(outputs), weights_N), squares_F * columns_F


def _correct_output(small: DuoFFN, examples: Examples) -> None:
    """Add to the output matrix, and bias if there is one, the ridge regression of the errors on the neurons."""
    inner, device = small.down_proj.in_features, examples.weights_N.device
    bias = small.down_proj.bias
    features = inner if bias is None else inner + 1
    gram = torch.zeros(features, features, dtype=torch.float64, device=device)
    cross = torch.zeros(features, small.down_proj.out_features, dtype=torch.float64, device=device)
    for start in range(0, len(examples.weights_N), _PART):
        part = examples.rows(slice(start, start + _PART))
        neurons_NS = _neurons(small, part.states_ND)
        if bias is not None:
            neurons_NS = nn.functional.pad(neurons_NS, (0, 1), value=1.0)
        weighted_SN = (neurons_NS * part.weights_N[:, None]).T
        gram += weighted_SN @ neurons_NS
        cross += weighted_SN @ (part.outputs_ND - small.down_proj(neurons_NS[:, :inner]))
    gram.diagonal()[:inner] += _RIDGE * gram.diagonal()[:inner].mean().clamp(min=torch.finfo(torch.float32).tiny)
    solution = torch.linalg.solve(gram, cross).float()
    small.down_proj.weight.add_(solution[:inner].T)
    if bias is not None:
        bias.add_(solution[inner])


def _neurons(ffn: DuoFFN, states_ND: Tensor) -> Tensor:
    """What the output matrix is applied to, [N, F]."""
    up_NF = ffn.up_proj(states_ND)
    return ffn.act_fn(up_NF) if ffn.gate_proj is None else ffn.act_fn(ffn.gate_proj(states_ND)) * up_NF


def _report(explained: list[float], layers: int, seconds: float) -> str:
    left = seconds / len(explained) * (layers - len(explained))
    return (
        f"small FFN of layer {len(explained)}/{layers}: explains {explained[-1]:.0%} of the variance of the big "
        f"one's output  ETA {int(left // 60)}:{int(left % 60):02d}"
    )
