"""Selection noise: what a peek at the label buys, measured on drawn labels that nobody could predict.

Shape letters: B sequences, T tokens, N = B * T, Q cells, S pairs of labels, K budgets, V vocabulary, D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from duollm.oracle.budgets import Budget, Cells
from duollm.oracle.contexts import Batch
from duollm.oracle.frontier import Frontier
from duollm.oracle.reductions import BestSoFar, Reduction


@dataclass(frozen=True)
class LabelSource:
    """The prediction from which labels are drawn.

    Attributes:
        model: a causal language model of the same vocabulary; None: the searched model, all layers big.
        temperature: divides the logits; below 1, likely words become likelier.
    """

    model: PreTrainedModel | None = None
    temperature: float = 1.0

    def prediction(self, ids_BT: Tensor, own_BTV: Tensor) -> Tensor:
        """Return the probabilities of the next token, float32 [B, T, V].

        Args:
            own_BTV: logits, or log-probabilities, of the searched model with all layers big.
        """
        logits_BTV = own_BTV
        if self.model is not None:  # models of one tokenizer may pad their embeddings to different lengths
            given_BTV = self.model(input_ids=ids_BT, use_cache=False).logits
            logits_BTV = pad(given_BTV, (0, own_BTV.shape[-1] - given_BTV.shape[-1]), value=-torch.inf)
        return (logits_BTV.float() / self.temperature).softmax(-1)


OWN_PREDICTION = LabelSource()


class DrawnLabels(Reduction):
    """Picks routes with labels y' drawn from a prediction, and scores them on second draws y''.

    The oracle picks the best of thousands of routes with the label in hand, so part of its gain is luck. Its gain on y'
    is nothing but luck (docs/oracle.md, "Selection noise").

    The surprise of a drawn label is its nll with all layers big minus the expectation of that nll. It has mean zero
    and is correlated with the label's loss under any route. It is subtracted from the losses as a control variate,
    which leaves their expectation and removes most of the variance.

    Attributes:
        pairs: number S of pairs (y', y'') per position. The columns are means over them.
        source: the prediction from which labels are drawn.
        label_2SN: y' and y''.
        excess_2SN: their surprise, nats.
        parts: the search for every pair.
        expected_ND: the mean of the head's embeddings under the prediction. As a label, it loses what a draw loses in
            expectation.
    """

    every_route = True
    parts: Sequence[BestSoFar] = ()

    def __init__(self, pairs: int = 1, source: LabelSource = OWN_PREDICTION) -> None:
        self.pairs, self.source = pairs, source

    def begin(self, batch: Batch, cells: Cells, budgets: Sequence[Budget], generator: torch.Generator) -> None:
        """Draw the labels; there is a search for every pair."""
        self.label_2SN, self.excess_2SN, self.expected_ND = draw_labels(batch, self.pairs, generator, self.source)
        self.parts = [BestSoFar(*batch.model.lm_head.weight[label_2N]) for label_2N in self.label_2SN.unbind(1)]
        super().begin(batch, cells, budgets, generator)

    def columns(self, frontier: Frontier) -> dict[str, Tensor]:
        """Return the lowest nll of y' and the nll of y'' under the same routes, both minus their surprise.

        The routes themselves are those of the first pair.
        """
        picked_SKBT = torch.stack([frontier.read(each.nll_QN, each.nll_QN) for each in self.parts])
        scored_SKBT = torch.stack([frontier.read(each.nll_QN, each.score_QN) for each in self.parts])
        excess_2SBT = self.excess_2SN[..., self.rows_N].unflatten(-1, frontier.padding_BT.shape)
        return {
            "resampled_nll": (picked_SKBT - excess_2SBT[0][:, None]).mean(0),
            "resampled_route": frontier.read(self.parts[0].nll_QN, self.parts[0].ids_QN),
            "resampled_score": (scored_SKBT - excess_2SBT[1][:, None]).mean(0),
        }


def draw_labels(
    batch: Batch, pairs: int, generator: torch.Generator, source: LabelSource
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw pairs of labels y', y'' from a prediction.

    Returns:
        The labels and their surprise in nats, each [2, S, N], and the prediction's mean embedding in the head [N, D].
    """
    own_BTV = batch.model(input_ids=batch.ids_BT, use_cache=False).logits.float()
    prediction_NV = source.prediction(batch.ids_BT, own_BTV).flatten(0, 1)
    nll_NV = -own_BTV.log_softmax(-1).flatten(0, 1)
    drawn_NS = torch.multinomial(prediction_NV, 2 * pairs, replacement=True, generator=generator)
    excess_NS = nll_NV.gather(1, drawn_NS) - (prediction_NV * nll_NV).sum(-1, keepdim=True)
    label_2SN, excess_2SN = (each.T.unflatten(0, (2, pairs)) for each in (drawn_NS, excess_NS))
    weight_VD = batch.model.lm_head.weight
    return label_2SN, excess_2SN, prediction_NV.to(weight_VD.dtype) @ weight_VD
