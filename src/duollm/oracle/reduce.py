"""Reductions of leaf losses while they stream by, and the judge that spares the head most leaves.

Shape letters: P routes in a block, N tokens, Q cells, S draws, R routes, M rows, D hidden.
"""

from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from duollm.models.modeling_duo import DuoForCausalLM
from duollm.oracle.head import HeadBound, log_normaliser

# The bound and the exact loss are rounded differently; a leaf this close to the best is evaluated too.
_ROUNDING = 1e-4


@dataclass
class Contest:
    """The lowest nll of each token in each cell, and the route that reached it.

    Ties go to the smaller route id.

    Attributes:
        label_ND: the head's embeddings of the labels that choose.
        nll_QN: float32, +inf until a route of that cell was seen.
        ids_QN: int64 route ids.
        drawn_QNS: route ids that compete, per cell and token (random controls); None: all routes.
        scored_ND: embeddings of other labels under which the chosen routes are scored too.
        score_QN: the nll of those labels under the chosen routes.
    """

    label_ND: Tensor
    nll_QN: Tensor
    ids_QN: Tensor
    drawn_QNS: Tensor | None = None
    scored_ND: Tensor | None = None
    score_QN: Tensor | None = None

    @classmethod
    def open(
        cls, label_ND: Tensor, cells: int, drawn_QNS: Tensor | None = None, scored_ND: Tensor | None = None
    ) -> Self:
        """Start with nothing seen."""
        nll_QN = torch.full((cells, len(label_ND)), torch.inf, device=label_ND.device)
        ids_QN = torch.full_like(nll_QN, torch.iinfo(torch.long).max, dtype=torch.long)
        return cls(label_ND, nll_QN, ids_QN, drawn_QNS, scored_ND, None if scored_ND is None else nll_QN.clone())

    def eligible(self, ids_PN: Tensor, cell_PN: Tensor) -> Tensor | None:
        """Which routes compete for which tokens, bool [P, N]; None when all do."""
        if self.drawn_QNS is None:
            return None
        tokens_N = torch.arange(ids_PN.shape[1], device=ids_PN.device)
        return (self.drawn_QNS[cell_PN, tokens_N] == ids_PN[..., None]).any(-1)

    def update(self, cell_M: Tensor, tokens_M: Tensor, ids_M: Tensor, nll_M: Tensor, score_M: Tensor | None) -> None:
        """Take in exact losses; a token may occur under many routes."""
        place_M = cell_M * self.nll_QN.shape[1] + tokens_M
        best, ids = self.nll_QN.view(-1), self.ids_QN.view(-1)
        lowest = best.scatter_reduce(0, place_M, nll_M, "amin")
        ids[lowest < best] = torch.iinfo(torch.long).max
        reached_M = nll_M == lowest[place_M]
        ids.scatter_reduce_(0, place_M[reached_M], ids_M[reached_M], "amin")
        best.copy_(lowest)
        if self.score_QN is not None and score_M is not None:
            won_M = reached_M & (ids_M == ids[place_M])
            self.score_QN.view(-1)[place_M[won_M]] = score_M[won_M]


@dataclass
class LeafTable:
    """The losses of some tokens under every route: from them come fixed patterns and order statistics.

    Attributes:
        tokens_M: indices of the tokens.
        nll_MR: float32, nats; nan where a route was not searched.
    """

    tokens_M: Tensor
    nll_MR: Tensor

    @classmethod
    def of(cls, counted_N: Tensor, routes: int) -> Self:
        """An empty table of the tokens where `counted_N` is true."""
        tokens_M = counted_N.nonzero()[:, 0]
        return cls(tokens_M, torch.full((len(tokens_M), routes), torch.nan, device=counted_N.device))

    def update(self, ids_P: Tensor, nll_PN: Tensor) -> None:
        """Take in the losses of the table's tokens (the others are not read)."""
        self.nll_MR[:, ids_P] = nll_PN[:, self.tokens_M].T


@dataclass
class Judge:
    """Turns blocks of leaves into contest results, running the full head only where it can matter.

    A leaf's loss is its log-normaliser minus its label's logit. The logit is cheap and the
    log-normaliser has a cheap lower bound, so a leaf whose bound is above the best of every contest
    cannot win and is dropped. The first contest's labels are the true ones.

    Attributes:
        contests: what is being searched for.
        bound: the lower bound of the log-normaliser; None evaluates every leaf.
        table: its tokens are evaluated under every route.
        evaluated, seen: how many leaves (route, token) ran the full head, of how many.
    """

    model: DuoForCausalLM
    contests: list[Contest]
    bound: HeadBound | None
    table: LeafTable | None = None
    evaluated: int = field(default=0, init=False)
    seen: int = field(default=0, init=False)

    def update(self, ids_PN: Tensor, cell_PN: Tensor, hidden_PND: Tensor) -> None:
        """Take in normalised final states [P, N, D] of routes `ids_PN` that lie in cells `cell_PN`.

        Every token may have routes of its own; with `table` all tokens have the same.
        """
        block = _Block.of(ids_PN, cell_PN, hidden_PND, self.contests)
        self.seen += block.log_z_PN.numel()
        if self.bound is None:
            self._enter(block, torch.ones_like(block.log_z_PN, dtype=torch.bool))
        else:
            self._enter_possible(block, self.bound(hidden_PND) - _ROUNDING)
        if self.table is not None:
            self.table.update(ids_PN[:, 0], block.log_z_PN - block.logits[0])

    def _enter_possible(self, block: "_Block", bound_PN: Tensor) -> None:
        """First the most promising leaf of each cell, which lowers the bar; then all that still pass it."""
        lower = [
            bound_PN - logit_PN if eligible_PN is None else (bound_PN - logit_PN).where(eligible_PN, torch.inf)
            for logit_PN, eligible_PN in zip(block.logits, block.eligible, strict=True)
        ]
        for choose in (_most_promising, _still_possible):
            chosen_PN = torch.zeros_like(bound_PN, dtype=torch.bool)
            for contest, lower_PN in zip(self.contests, lower, strict=True):
                chosen_PN |= choose(lower_PN, block.cell_PN, contest.nll_QN)
            if self.table is not None:
                chosen_PN[:, self.table.tokens_M] = True
            self._enter(block, chosen_PN & block.log_z_PN.isnan())

    def _enter(self, block: "_Block", chosen_PN: Tensor) -> None:
        """Run the full head on the chosen leaves and enter them in the contests they are eligible for."""
        rows_M, tokens_M = chosen_PN.nonzero(as_tuple=True)
        hidden_MD = block.hidden_PND[rows_M, tokens_M]
        log_z_M = log_normaliser(self.model, hidden_MD)
        block.log_z_PN[rows_M, tokens_M] = log_z_M
        self.evaluated += len(rows_M)
        ids_M, cell_M = block.ids_PN[rows_M, tokens_M], block.cell_PN[rows_M, tokens_M]
        for contest, logit_PN, eligible_PN in zip(self.contests, block.logits, block.eligible, strict=True):
            nll_M = log_z_M - logit_PN[rows_M, tokens_M]
            score_M = None
            if contest.scored_ND is not None:
                score_M = log_z_M - (hidden_MD * contest.scored_ND[tokens_M]).sum(-1)
            if eligible_PN is not None:
                nll_M = nll_M.where(eligible_PN[rows_M, tokens_M], torch.inf)
            contest.update(cell_M, tokens_M, ids_M, nll_M, score_M)


@dataclass(frozen=True)
class _Block:
    """A block of leaves under judgement.

    Attributes:
        logits: per contest the logit [P, N] of its label.
        eligible: per contest which leaves compete, [P, N]; None when all do.
        log_z_PN: the exact log-normaliser; nan where the full head was not run.
    """

    ids_PN: Tensor
    cell_PN: Tensor
    hidden_PND: Tensor
    logits: list[Tensor]
    eligible: list[Tensor | None]
    log_z_PN: Tensor

    @classmethod
    def of(cls, ids_PN: Tensor, cell_PN: Tensor, hidden_PND: Tensor, contests: list[Contest]) -> Self:
        logits = [torch.einsum("pnd,nd->pn", hidden_PND, contest.label_ND).float() for contest in contests]
        eligible = [contest.eligible(ids_PN, cell_PN) for contest in contests]
        return cls(ids_PN, cell_PN, hidden_PND, logits, eligible, torch.full_like(logits[0], torch.nan))


def _most_promising(lower_PN: Tensor, cell_PN: Tensor, best_QN: Tensor) -> Tensor:
    """Where the lower bound is the block's lowest for its cell and token, and could beat the best so far."""
    lowest_QN = torch.full_like(best_QN, torch.inf)
    lowest_QN.scatter_reduce_(0, cell_PN, lower_PN, "amin")
    return (lower_PN == lowest_QN.gather(0, cell_PN)) & _still_possible(lower_PN, cell_PN, best_QN)


def _still_possible(lower_PN: Tensor, cell_PN: Tensor, best_QN: Tensor) -> Tensor:
    """Where the lower bound does not exceed the best so far."""
    return (lower_PN <= best_QN.gather(0, cell_PN)) & (lower_PN < torch.inf)
