"""Selection noise: what a peek at the label buys, measured on drawn labels that nobody could predict.

Shape letters: B sequences, T tokens, N = B * T, Q cells, S pairs of labels, K budgets, V vocabulary, D hidden.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from duollm.oracle.budgets import Budget, Cells, Frontier
from duollm.oracle.contexts import Batch
from duollm.oracle.reductions import BestSoFar, Reduction


class DrawnLabels(Reduction):
    """Picks routes with labels y' drawn from the all-big prediction, and scores them on second draws y''.

    The oracle picks the best of thousands of routes with the label in hand, so part of its gain is luck. Its gain on y'
    is nothing but luck (docs/oracle.md, "Selection noise").

    The surprise of a drawn label is its nll under the prediction minus the expectation of that nll. It has mean zero
    and is correlated with the label's loss under any route. It is subtracted from the losses as a control variate,
    which leaves their expectation and removes most of the variance.

    Attributes:
        pairs: number S of pairs (y', y'') per position. The columns are means over them.
        label_2SN: y' and y''.
        excess_2SN: their surprise, nats.
    """

    every_route = True

    def __init__(self, pairs: int = 1) -> None:
        self.pairs = pairs

    def begin(self, batch: Batch, cells: Cells, budgets: Sequence[Budget], generator: torch.Generator) -> None:
        """Draw the labels."""
        super().begin(batch, cells, budgets, generator)
        self.label_2SN, self.excess_2SN = draw_labels(batch, self.pairs, generator)
        self.best_S = [BestSoFar(*batch.model.lm_head.weight[label_2N]) for label_2N in self.label_2SN.unbind(1)]
        for each in self.best_S:
            each.begin(batch, cells, budgets, generator)

    def start(self, rows_N: Tensor) -> None:
        """Forget what was kept, because leaves of these tokens of the batch follow."""
        super().start(rows_N)
        for each in self.best_S:
            each.start(rows_N)

    @property
    def parts(self) -> Sequence[Reduction]:
        """One search for every pair."""
        return self.best_S

    def columns(self, frontier: Frontier) -> dict[str, Tensor]:
        """Return the lowest nll of y' and the nll of y'' under the same routes, both minus their surprise.

        The routes themselves are those of the first pair.
        """
        picked_SKBT = torch.stack([frontier.read(each.nll_QN, each.nll_QN) for each in self.best_S])
        scored_SKBT = torch.stack([frontier.read(each.nll_QN, each.score_QN) for each in self.best_S])
        excess_2SBT = self.excess_2SN[..., self.rows_N].unflatten(-1, frontier.padding_BT.shape)
        return {
            "resampled_nll": (picked_SKBT - excess_2SBT[0][:, None]).mean(0),
            "resampled_route": frontier.read(self.best_S[0].nll_QN, self.best_S[0].ids_QN),
            "resampled_score": (scored_SKBT - excess_2SBT[1][:, None]).mean(0),
        }


def draw_labels(batch: Batch, pairs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw pairs of labels y', y'' from the all-big prediction; return them and their surprise in nats, [2, S, N]."""
    logits_BTV = batch.model(input_ids=batch.ids_BT, use_cache=False).logits
    probabilities_NV = logits_BTV.float().softmax(-1).flatten(0, 1)
    drawn_NS = torch.multinomial(probabilities_NV, 2 * pairs, replacement=True, generator=generator)
    entropy_N = -torch.xlogy(probabilities_NV, probabilities_NV).sum(-1)
    excess_NS = -probabilities_NV.gather(1, drawn_NS).log() - entropy_N[:, None]
    label_2SN, excess_2SN = (each.T.unflatten(0, (2, pairs)) for each in (drawn_NS, excess_NS))
    return label_2SN, excess_2SN
