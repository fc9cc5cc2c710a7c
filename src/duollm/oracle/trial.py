"""Tries chosen routes on tokens in one context, and keeps the best of each token.

In contexts "reference" and "committed" a token's routes concern nobody else, so every token may try
routes of its own. In "shared" the tokens of a sequence try the same routes together.

Shape letters: P routes tried side by side, N tokens, G groups of tokens that try the same routes,
L layers, D hidden, Q cells.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from duollm.models.branch import Branch
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.oracle.batch import Batch
from duollm.oracle.budgets import Budget, Cells
from duollm.oracle.frontier import cell_of, read_frontier
from duollm.oracle.head import HeadBound
from duollm.oracle.reduce import Contest, Judge
from duollm.oracle.tree import Attend, attended, decoder_layers


@dataclass
class Trial:
    """Tokens whose routes are compared, and the best routes found so far.

    Attributes:
        cells: the route space, and what its routes spend.
        rows_N: which of the batch's tokens these are.
        attend: the context.
        together: so many consecutive tokens try the same routes (a sequence's in "shared", else 1).
        max_rows: how many hidden vectors to send through a layer at a time.
        bound: of the losses of all the batch's tokens.
        judge: holds the best per cell.
    """

    batch: Batch
    cells: Cells
    rows_N: Tensor
    attend: Attend
    together: int
    max_rows: int
    bound: HeadBound
    judge: Judge = field(init=False)

    def __post_init__(self) -> None:
        self.hidden_ND = self.batch.hidden_BTD.flatten(0, 1)[self.rows_N]
        self.counted_N = ~self.batch.padding_BT.flatten()[self.rows_N]
        label_ND = self.model.lm_head.weight[self.batch.labels_N[self.rows_N]]
        self.bound = self.bound.rows(self.rows_N)
        self.judge = Judge(self.model, [Contest.open(label_ND, len(self.cells.spent))], self.bound)

    @property
    def contest(self) -> Contest:
        """The best of every token in every cell."""
        return self.judge.contests[0]

    @property
    def model(self) -> DuoForCausalLM:
        """The model whose routes are tried."""
        return self.batch.model

    @property
    def groups(self) -> int:
        """G: how many groups of tokens choose for themselves what to try."""
        return len(self.rows_N) // self.together

    def try_routes(self, ids_PG: Tensor) -> None:
        """Run the groups on their routes and enter the losses."""
        for part_PG in ids_PG.split(max(1, self.max_rows // len(self.rows_N))):
            self.enter(part_PG, deque(self.follow(part_PG), maxlen=1).pop())

    def follow(self, ids_PG: Tensor) -> Iterator[Tensor]:
        """Yield the hidden states [P, N, D] that enter the first layer, and those after every layer."""
        routes_PNL = self.spread(self.cells.space.decode(ids_PG))
        hidden_PND = self.hidden_ND.expand(len(ids_PG), -1, -1)
        yield hidden_PND
        for layer, choice_PN in zip(decoder_layers(self.model.model), routes_PNL.unbind(-1), strict=True):
            attended_PND, states_PND = attended(layer, hidden_PND, self.attend)
            output_PND = attended_PND + layer.mlp(states_PND, choice_PN)
            if layer.skip_scope == "layer":
                output_PND = output_PND.where((choice_PN != Branch.SKIP)[..., None], hidden_PND)
            hidden_PND = output_PND
            yield hidden_PND

    def enter(self, ids_PG: Tensor, hidden_PND: Tensor) -> None:
        """Take in routes with their final hidden states, before the final norm."""
        cell_PN, ids_PN = self.spread(self._cells_of(ids_PG)), self.spread(ids_PG)
        self.judge.update(ids_PN, cell_PN, self.model.model.norm(hidden_PND))

    def estimate(self, hidden_PND: Tensor) -> Tensor:
        """A lower bound [P, N] of the nll of tokens whose last layer leaves these hidden states."""
        final_PND = self.model.model.norm(hidden_PND)
        return self.bound(final_PND) - torch.einsum("pnd,nd->pn", final_PND, self.contest.label_ND)

    def spread(self, values_PG: Tensor) -> Tensor:
        """From groups to tokens: [P, G, ...] to [P, N, ...]."""
        return values_PG.repeat_interleave(self.together, dim=1)

    def best(self, budget: Budget) -> tuple[Tensor, Tensor]:
        """The lowest nll of every token within a budget so far, and its route id, each [N]."""
        nll_QN, ids_QN = self.contest.nll_QN, self.contest.ids_QN
        nobody_1N = torch.zeros_like(self.counted_N)[None]
        nll_11N, ids_11N = (read_frontier([budget], self.cells, nll_QN, each, nobody_1N) for each in (nll_QN, ids_QN))
        return nll_11N[0, 0], ids_11N[0, 0]

    def _cells_of(self, ids_PG: Tensor) -> Tensor:
        routes_PGL = self.cells.space.decode(ids_PG)
        small_PG, big_PG = ((routes_PGL == branch).sum(-1) for branch in (Branch.SMALL, Branch.BIG))
        return cell_of(self.cells, small_PG, big_PG)
