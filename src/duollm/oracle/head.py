"""From final hidden states to losses: the full head, and a cheap lower bound that spares most of it.

Shape letters: P prefixes (routes), N tokens, D hidden, V vocabulary, J columns of the bound, M rows.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from duollm.models.modeling_duo import DuoForCausalLM

_BLOCK_BYTES = 8 * 2**20  # logits computed at a time: stays inside the processor's cache


def log_normaliser(model: DuoForCausalLM, hidden_MD: Tensor) -> Tensor:
    """log of the sum over the vocabulary of exp(logit), [M], for normalised final states [M, D]; float32."""
    weight_VD = model.lm_head.weight
    blocks = hidden_MD.split(max(1, _BLOCK_BYTES // (4 * weight_VD.shape[0])))
    return torch.cat([_logsumexp(linear(block_MD, weight_VD).float()) for block_MD in blocks])


def _logsumexp(logits_MV: Tensor) -> Tensor:
    """As torch.logsumexp; the loss kernel does it in a third of the time on CPUs."""
    word_M = logits_MV.new_zeros(len(logits_MV), dtype=torch.long)
    return cross_entropy(logits_MV, word_M, reduction="none") + logits_MV[:, 0]


@dataclass(frozen=True)
class HeadBound:
    """Lower bound on the log-normaliser of any hidden state at each token, tight near a reference state.

    Split the vocabulary at token n into groups j. With logits x_v = h . w_v, and any distribution
    q over group j, Jensen's inequality gives

        log sum_{v in j} exp(x_v) >= sum_v q_v (x_v - log q_v) = h . (sum_v q_v w_v) + H(q).

    So each group acts as one pseudo-word with embedding sum_v q_v w_v and bias H(q), and the
    log-sum-exp over the pseudo-words bounds log Z from below. Taking q from a reference prediction
    (all big) makes it tight for routes that predict alike; groups of one word are exact. The most
    probable words get a group each, the rest are pooled in groups of similar probability.

    Attributes:
        columns_NDJ: embeddings of the pseudo-words.
        bias_NJ: their biases, nats.
    """

    columns_NDJ: Tensor
    bias_NJ: Tensor

    @classmethod
    def around(cls, model: DuoForCausalLM, hidden_ND: Tensor, singles: int = 24, pools: int = 8) -> Self:
        """Build the bound from reference final states [N, D]: `singles` exact words, `pools` groups."""
        weight_VD = model.lm_head.weight.float()
        singles = min(singles, weight_VD.shape[0] - 1)
        pools = min(pools, weight_VD.shape[0] - singles)
        parts = [cls._columns(weight_VD, h, singles, pools) for h in hidden_ND.split(64)]
        columns_NJD, bias_NJ = (torch.cat(part) for part in zip(*parts, strict=True))
        return cls(columns_NJD.transpose(1, 2).contiguous(), bias_NJ)

    @staticmethod
    def _columns(weight_VD: Tensor, hidden_ND: Tensor, singles: int, pools: int) -> tuple[Tensor, Tensor]:
        log_p_NV = linear(hidden_ND.float(), weight_VD).log_softmax(-1)
        words_NV = log_p_NV.argsort(-1, descending=True)
        columns = [weight_VD[words_NV[:, :singles]]]
        biases = [weight_VD.new_zeros(len(hidden_ND), singles)]
        rest_NV = words_NV[:, singles:]
        # Pools double in size from the most probable to the least: probable words get finer pools.
        sizes = torch.logspace(0, pools - 1, pools, base=2.0)
        edges = (sizes.cumsum(0) / sizes.sum() * rest_NV.shape[1]).round().long().tolist()
        for start, end in zip([0, *edges[:-1]], edges, strict=True):
            if start == end:
                continue
            log_q_NV = log_p_NV.gather(1, rest_NV[:, start:end]).log_softmax(-1)
            q_NV = log_q_NV.exp()
            pooled = torch.zeros_like(log_p_NV).scatter_(1, rest_NV[:, start:end], q_NV)
            columns.append((pooled @ weight_VD)[:, None])
            biases.append(-(q_NV * log_q_NV).sum(-1, keepdim=True))
        return torch.cat(columns, dim=1), torch.cat(biases, dim=1)

    def __call__(self, hidden_PND: Tensor) -> Tensor:
        """Lower bound of the log-normaliser [P, N] for normalised final states [P, N, D]."""
        scores_NPJ = torch.baddbmm(self.bias_NJ[:, None], hidden_PND.transpose(0, 1).float(), self.columns_NDJ)
        return scores_NPJ.logsumexp(-1).T

    def rows(self, index: Tensor) -> Self:
        """The bound at some of the tokens."""
        return replace(self, columns_NDJ=self.columns_NDJ[index], bias_NJ=self.bias_NJ[index])
