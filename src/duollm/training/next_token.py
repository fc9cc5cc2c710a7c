"""The loss of the next token without all logits: block by block, with the gradient taken at once.

Shape letters: B batch, T tokens, N rows (positions that have a next token), D hidden, V vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from duollm.models.modeling_duo import DuoForCausalLM

_BLOCKS, _ROWS = {"cpu": 1 << 22, "cuda": 1 << 28}, 256
"""Logits per block: what stays in a CPU's caches, or keeps a GPU busy. And the fewest rows of a block, for each adds a
gradient of the size of the head."""

Scorer = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""`nll_and_gradient`, compiled or not."""


def next_token_loss(model: DuoForCausalLM, hidden_BTD: Tensor, token_ids_BT: Tensor, scorer: Scorer) -> Tensor:
    """Return the mean nll (nats) of token t + 1 given the final normalised hidden state of token t.

    It equals the loss of the model's own forward up to rounding. Only a block of the logits is held at a time, because
    the gradient is computed in the forward pass; so there is no second derivative.
    """
    states_ND = hidden_BTD[:, :-1].flatten(0, 1)
    loss: Tensor = _HeadLoss.apply(states_ND, model.lm_head.weight, token_ids_BT[:, 1:].flatten(), scorer)
    return loss


def nll_and_gradient(logits_NV: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum of the nll, and its gradient by the logits as a product of [N, V] and [N, 1].

    The softmax is not divided by its sum here: scaling rows of width D later is cheaper than a pass over V.
    Logits in float32 are overwritten.
    """
    wide_NV = logits_NV.float()
    shifted_NV = wide_NV.sub_(wide_NV.amax(-1, keepdim=True))
    label_N1 = shifted_NV.gather(1, labels_N[:, None])
    weights_NV = shifted_NV.exp_()
    sum_N1 = weights_NV.sum(-1, keepdim=True)
    weights_NV.scatter_(1, labels_N[:, None], label_N1.exp() - sum_N1)
    dtype = logits_NV.dtype
    return (sum_N1.log() - label_N1).sum(), weights_NV.to(dtype), sum_N1.reciprocal().to(dtype)


def block_of_logits(device: torch.device) -> int:
    """How many logits are held at a time."""
    return _BLOCKS.get(device.type, _BLOCKS["cpu"])


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, scorer: Scorer) -> Tensor:
        cast_VD = weight_VD.to(states_ND.dtype)
        blocks = math.ceil(len(states_ND) / max(_ROWS, block_of_logits(states_ND.device) // len(weight_VD)))
        rows = math.ceil(len(states_ND) / blocks)  # of one size where possible: another is compiled anew
        for_states, for_weight = ctx.needs_input_grad[:2]
        states_gradient = torch.empty_like(states_ND) if for_states else None
        weight_gradient = torch.zeros_like(weight_VD) if for_weight else None
        total = states_ND.new_zeros((), dtype=torch.float32)
        for block in (slice(start, start + rows) for start in range(0, len(states_ND), rows)):
            nll, gradient_NV, scale_N1 = scorer(states_ND[block] @ cast_VD.T, labels_N[block])
            total += nll
            if states_gradient is not None:
                torch.mul(gradient_NV @ cast_VD, scale_N1, out=states_gradient[block])
            if weight_gradient is not None:
                weight_gradient += gradient_NV.T @ (states_ND[block] * scale_N1)
        ctx.gradients, ctx.rows = (states_gradient, weight_gradient), len(states_ND)
        return total / len(states_ND)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scale = gradient / ctx.rows
        return (*(None if each is None else each * scale for each in ctx.gradients), None, None)
