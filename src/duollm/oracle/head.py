"""Turns final hidden states into losses: the full head, and a cheap lower bound that replaces most of it.

Shape letters: P prefixes (routes), N tokens, D hidden, V vocabulary, J columns of the bound, M rows.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from duollm.models.modeling_duo import DuoForCausalLM

_BLOCK_BYTES = 8 * 2**20  # logits that are computed at a time; they stay inside the processor's cache
_GPU_BLOCK_BYTES = 256 * 2**20  # on a GPU, where few large products count
_PRODUCTS = {"highest": 0.0, "high": 2.0**-10, "medium": 2.0**-7}  # rounding of float32's factors: none, tf32, bf16
_WORDS = 2048  # whose embeddings are read at a time, for many rows: a large vocabulary does not fit the cache

LARGE = 8 * _WORDS
"""From so many words on, `HeadBound.closer` costs little beside the full head."""


def log_normaliser(model: DuoForCausalLM, hidden_MD: Tensor, words: int | None = None) -> Tensor:
    """Return log(sum over the vocabulary of exp(logit)), [M], float32, for normalised final states [M, D].

    Over the first `words` alone it is a lower bound.
    """
    weight_VD = model.lm_head.weight[:words]
    words_VD = weight_VD.split(_WORDS if weight_VD.device.type == "cpu" else len(weight_VD))
    rows = [
        torch.stack([_logsumexp(linear(block_MD, each_VD).float()) for each_VD in words_VD]).logsumexp(0)
        for block_MD in hidden_MD.split(_rows_per_block(words_VD[0]))
    ]
    return torch.cat(rows)


def _rows_per_block(weight_VD: Tensor) -> int:
    """How many rows of logits are computed at a time."""
    size = _BLOCK_BYTES if weight_VD.device.type == "cpu" else _GPU_BLOCK_BYTES
    return max(1, size // (4 * len(weight_VD)))


def _logsumexp(logits_MV: Tensor) -> Tensor:
    """As torch.logsumexp; the loss kernel does it in a third of the time on CPUs."""
    word_M = logits_MV.new_zeros(len(logits_MV), dtype=torch.long)
    return cross_entropy(logits_MV, word_M, reduction="none") + logits_MV[:, 0]


@dataclass(frozen=True)
class HeadBound:
    """Lower bound on the log-normaliser of any hidden state at each token, tight near a reference state.

    The most probable words of a reference prediction stand for themselves. All other words act as a single
    pseudo-word. With logits x_v = h . w_v and any distribution q over them, Jensen's inequality gives

        log sum_v exp(x_v) >= sum_v q_v (x_v - log q_v) = h . (sum_v q_v w_v) + H(q),

    which is a word with embedding sum_v q_v w_v and bias H(q). The log-sum-exp over these few columns bounds log Z from
    below. With q from the reference the bound is tight for routes with similar predictions (docs/oracle.md).

    Attributes:
        columns_NDJ: embeddings of the words and of the pseudo-word.
        bias_NJ: their biases, nats; 0 except for the pseudo-word.
        rounding: largest relative error of a logit in the head's number format.
    """

    columns_NDJ: Tensor
    bias_NJ: Tensor
    rounding: float

    @classmethod
    def around(cls, model: DuoForCausalLM, hidden_ND: Tensor, words: int = 31) -> Self:
        """Build the bound from reference final states [N, D]; this many words stand for themselves."""
        weight_VD = model.lm_head.weight
        device = weight_VD.device.type
        computed = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VD.dtype
        full = computed == torch.float32
        rounding = _PRODUCTS[torch.get_float32_matmul_precision()] if full else torch.finfo(computed).eps
        with torch.autocast(device, enabled=False):
            return cls(*_columns(weight_VD.float(), hidden_ND, words), rounding)

    def __call__(self, hidden_PND: Tensor) -> Tensor:
        """Return a lower bound of the log-normaliser [P, N] for normalised final states [P, N, D]."""
        with torch.autocast(hidden_PND.device.type, enabled=False):
            scores_NPJ = torch.baddbmm(self.bias_NJ[:, None], hidden_PND.transpose(0, 1).float(), self.columns_NDJ)
        return self._rounded_down(scores_NPJ.logsumexp(-1).T)

    def closer(self, model: DuoForCausalLM, hidden_MD: Tensor) -> Tensor:
        """Return another lower bound, [M], for normalised final states [M, D]: the sum over the words of lowest id.

        Tokenizers learn the most frequent words first, so these hold most of any prediction, also far from the
        reference, where the first bound is loose.
        """
        return self._rounded_down(log_normaliser(model, hidden_MD, _WORDS))

    def _rounded_down(self, bound: Tensor) -> Tensor:
        return bound - self.rounding * bound.abs() if self.rounding else bound

    def rows(self, index: Tensor) -> Self:
        """Return the bound at some of the tokens."""
        return replace(self, columns_NDJ=self.columns_NDJ[index], bias_NJ=self.bias_NJ[index])


def _columns(weight_VD: Tensor, hidden_ND: Tensor, words: int) -> tuple[Tensor, Tensor]:
    """Columns [N, D, J] and biases [N, J] of the bound around hidden states."""
    words = min(words, weight_VD.shape[0] - 1)
    columns_NJD = weight_VD.new_empty(len(hidden_ND), words + 1, weight_VD.shape[1])
    bias_NJ = weight_VD.new_zeros(len(hidden_ND), words + 1)
    for rows in torch.arange(len(hidden_ND), device=hidden_ND.device).split(_rows_per_block(weight_VD)):
        log_p_NV = linear(hidden_ND[rows].float(), weight_VD).log_softmax(-1)
        top_NJ = log_p_NV.topk(words).indices
        log_q_NV = log_p_NV.scatter(1, top_NJ, -torch.inf).log_softmax(-1)
        q_NV = log_q_NV.exp()
        columns_NJD[rows, :-1] = weight_VD[top_NJ]
        columns_NJD[rows, -1] = q_NV @ weight_VD
        bias_NJ[rows, -1] = -torch.xlogy(q_NV, q_NV).sum(-1)
    return columns_NJD.transpose(1, 2).contiguous(), bias_NJ
