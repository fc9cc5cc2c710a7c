"""Reductions of leaf losses while they stream by, and the judge that spares the head most leaves.

Shape letters: P routes in a block, N tokens, K budgets, S draws, R routes, G groups, M rows, D hidden.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from duollm.models.modeling_duo import DuoForCausalLM
from duollm.oracle.head import HeadBound, log_normaliser

# The bound and the exact loss are rounded differently; a leaf this close to the best is evaluated too.
_ROUNDING = 1e-4


@dataclass
class Contest:
    """The lowest nll of each token under each budget, and the route that reached it.

    Ties go to the smaller route id.

    Attributes:
        label_ND: the head's embeddings of the labels.
        nll_KN: float32, +inf until a route of that budget was seen.
        ids_KN: int64 route ids.
        drawn_KNS: route ids that compete, per budget and token (random controls); None: all routes.
    """

    label_ND: Tensor
    nll_KN: Tensor
    ids_KN: Tensor
    drawn_KNS: Tensor | None = None

    @classmethod
    def open(cls, label_ND: Tensor, budgets: int, drawn_KNS: Tensor | None = None) -> "Contest":
        """Start with nothing seen."""
        shape, device = (budgets, len(label_ND)), label_ND.device
        ids_KN = torch.full(shape, torch.iinfo(torch.long).max, device=device)
        return cls(label_ND, torch.full(shape, torch.inf, device=device), ids_KN, drawn_KNS)

    def eligible(self, ids_P: Tensor, budget_P: Tensor) -> Tensor | None:
        """Which routes compete for which tokens, bool [P, N]; None when all do."""
        if self.drawn_KNS is None:
            return None
        return (self.drawn_KNS[budget_P] == ids_P[:, None, None]).any(-1)

    def update(self, budget_M: Tensor, tokens_M: Tensor, ids_M: Tensor, nll_M: Tensor) -> None:
        """Take in exact losses; a token may occur under many routes."""
        cell_M = budget_M * self.nll_KN.shape[1] + tokens_M
        best, ids = self.nll_KN.view(-1), self.ids_KN.view(-1)
        lowest = best.scatter_reduce(0, cell_M, nll_M, "amin")
        ids[lowest < best] = torch.iinfo(torch.long).max
        reached_M = nll_M == lowest[cell_M]
        ids.scatter_reduce_(0, cell_M[reached_M], ids_M[reached_M], "amin")
        best.copy_(lowest)


@dataclass
class RouteSums:
    """Per group of tokens (a document) and route the sum of nll, from which fixed patterns are judged.

    Attributes:
        group_N: the group of each token; -1 leaves the token out.
        sums_GR: float64, nats.
    """

    group_N: Tensor
    sums_GR: Tensor

    @property
    def counted_N(self) -> Tensor:
        """Which tokens are counted, bool [N]."""
        return self.group_N >= 0

    def update(self, ids_P: Tensor, nll_PN: Tensor) -> None:
        """Take in the losses of all counted tokens (the others are not read)."""
        counted_N = self.counted_N
        sums_GP = self.sums_GR.new_zeros(len(self.sums_GR), len(ids_P))
        sums_GP.index_add_(0, self.group_N[counted_N], nll_PN[:, counted_N].T.double())
        self.sums_GR[:, ids_P] += sums_GP


@dataclass
class Judge:
    """Turns blocks of leaves into contest results, running the full head only where it can matter.

    A leaf's loss is its log-normaliser minus its label's logit. The logit is cheap and the
    log-normaliser has a cheap lower bound, so a leaf whose bound is above the best of every contest
    cannot win and is dropped. The first contest's labels are the true ones.

    Attributes:
        contests: what is being searched for.
        bound: the lower bound; None evaluates every leaf.
        sums: sums over fixed patterns; its counted tokens are evaluated under every route.
        evaluated, seen: how many leaves (route, token) ran the full head, of how many.
    """

    model: DuoForCausalLM
    contests: list[Contest]
    bound: HeadBound | None
    sums: RouteSums | None = None
    evaluated: int = field(default=0, init=False)
    seen: int = field(default=0, init=False)

    def update(self, ids_P: Tensor, budget_P: Tensor, hidden_PND: Tensor) -> None:
        """Take in normalised final states [P, N, D] of routes `ids_P`, budget indices `budget_P`."""
        logits = [torch.einsum("pnd,nd->pn", hidden_PND, contest.label_ND) for contest in self.contests]
        self.seen += logits[0].numel()
        log_z_PN = torch.full_like(logits[0], torch.nan)
        if self.bound is None:
            self._evaluate(log_z_PN, torch.ones_like(log_z_PN, dtype=torch.bool), hidden_PND)
            self._report(log_z_PN, log_z_PN.isfinite(), ids_P, budget_P, logits)
        else:
            self._evaluate_pruned(log_z_PN, ids_P, budget_P, hidden_PND, logits)
        if self.sums is not None:
            self.sums.update(ids_P, log_z_PN - logits[0])

    def _evaluate_pruned(
        self, log_z_PN: Tensor, ids_P: Tensor, budget_P: Tensor, hidden_PND: Tensor, logits: list[Tensor]
    ) -> None:
        """First the most promising leaf of each cell, which lowers the bar; then all that still pass it."""
        bound_PN = self.bound(hidden_PND) - _ROUNDING
        lower = []
        for contest, logit_PN in zip(self.contests, logits, strict=True):
            eligible_PN = contest.eligible(ids_P, budget_P)
            lower_PN = bound_PN - logit_PN
            lower.append(lower_PN if eligible_PN is None else lower_PN.where(eligible_PN, torch.inf))
        for pick in (_most_promising, _still_possible):
            chosen_PN = torch.zeros_like(log_z_PN, dtype=torch.bool)
            for contest, lower_PN in zip(self.contests, lower, strict=True):
                chosen_PN |= pick(lower_PN, budget_P, contest.nll_KN)
            if self.sums is not None:
                chosen_PN |= self.sums.counted_N
            chosen_PN &= log_z_PN.isnan()
            self._evaluate(log_z_PN, chosen_PN, hidden_PND)
            self._report(log_z_PN, chosen_PN, ids_P, budget_P, logits)

    def _evaluate(self, log_z_PN: Tensor, chosen_PN: Tensor, hidden_PND: Tensor) -> None:
        """Fill in the exact log-normaliser of the chosen leaves."""
        self.evaluated += int(chosen_PN.sum())
        log_z_PN[chosen_PN] = log_normaliser(self.model, hidden_PND[chosen_PN])

    def _report(
        self, log_z_PN: Tensor, chosen_PN: Tensor, ids_P: Tensor, budget_P: Tensor, logits: list[Tensor]
    ) -> None:
        """Enter the chosen leaves in every contest that they are eligible for."""
        for contest, logit_PN in zip(self.contests, logits, strict=True):
            eligible_PN = contest.eligible(ids_P, budget_P)
            entering_PN = chosen_PN if eligible_PN is None else chosen_PN & eligible_PN
            rows_M, tokens_M = entering_PN.nonzero(as_tuple=True)
            nll_M = (log_z_PN - logit_PN)[rows_M, tokens_M]
            contest.update(budget_P[rows_M], tokens_M, ids_P[rows_M], nll_M)


def _most_promising(lower_PN: Tensor, budget_P: Tensor, best_KN: Tensor) -> Tensor:
    """Where the lower bound is the block's lowest for its budget and token, and below the best so far."""
    lowest_KN = torch.full_like(best_KN, torch.inf)
    lowest_KN.scatter_reduce_(0, budget_P[:, None].expand_as(lower_PN), lower_PN, "amin")
    return (lower_PN == lowest_KN[budget_P]) & _still_possible(lower_PN, budget_P, best_KN)


def _still_possible(lower_PN: Tensor, budget_P: Tensor, best_KN: Tensor) -> Tensor:
    """Where the lower bound does not exceed the best so far."""
    return (lower_PN <= best_KN[budget_P]) & (lower_PN < torch.inf)
