"""Beam over layers: keep the prefixes that promise most, at a cost that grows linearly with depth.

The promise of a prefix is an estimate of the loss to which it leads. The remaining layers are assumed to add to its
hidden state what they add on the reference route, all layers big, and the loss is estimated by the head's lower bound,
so no prefix runs the full head. Prefixes compete only with those that have the same number of big layers; otherwise all
would spend their budget in the first layers. Tokens that must share prefixes (context "shared") keep those that
together serve them best.

Shape letters: P prefixes, N tokens, G groups of tokens that share prefixes, U tokens in a group,
M candidates, W chosen candidates, D hidden, C branches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from duollm.oracle.budgets import Budget
from duollm.oracle.tree import Prefixes, Tree, join
from duollm.oracle.trial import Method, Trial


@dataclass(frozen=True)
class Beam(Method):
    """A beam over the layers: one per token in contexts "reference" and "committed", one per sequence in "shared".

    One beam serves all budgets. It holds `width` prefixes, divided between the numbers of big layers from which a
    budget can still be met (at least one prefix each). So time grows with width * L. Hidden states take width * (C + 1)
    * N * D * 4 bytes, whatever `memory_bytes` says.

    Attributes:
        width: number of prefixes to keep after each layer, over all budgets.
    """

    least = (("width", 1),)
    width: int = 64

    def __call__(self, trial: Trial, budgets: Sequence[Budget], generator: torch.Generator) -> None:
        """Walk from the first choice to the last, and enter the routes that reach the end."""
        cells, space = trial.cells, trial.cells.space
        all_big_1G = torch.full((1, trial.groups), space.size - 1)
        completed_1ND = [*trial.follow(all_big_1G)]
        tree = Tree(trial.model.model, cells, cells.wanted(budgets, trial.positions), trial.rows)
        block = tree.root(trial.hidden_ND, trial.attend, trial.groups)
        for depth, walked in enumerate([*space.leaders[1:], None]):
            parts = block.parts(trial.rows.walked)
            block = join([child for part in parts for child in tree.step(part, depth, trial.attend)])
            if walked is not None:
                rest_1ND = completed_1ND[-1] - completed_1ND[walked]
                parts = block.parts(trial.rows.walked)
                promise_PN = torch.cat([trial.estimate(part.hidden_PND + rest_1ND) for part in parts])
                promise_PGU = promise_PN.where(trial.counted_N, 0).unflatten(1, (trial.groups, -1))
                big_P = block.spent_PG2[:, 0, 1]  # as many for every group
                block = _choose(block, _best(big_P, promise_PGU, self.width))
        for part in block.parts(trial.rows.walked):
            trial.enter(part.ids_PG, part.spent_PG2, part.hidden_PND)


def _choose(block: Prefixes, rows_WG: Tensor) -> Prefixes:
    """Let every group choose rows of its own; those beside each other have as many big layers."""
    groups_G = torch.arange(rows_WG.shape[1], device=rows_WG.device)
    hidden_WGUD = block.hidden_PND.unflatten(1, (len(groups_G), -1))[rows_WG, groups_G]
    here = rows_WG.cpu(), torch.arange(rows_WG.shape[1])
    return Prefixes(block.ids_PG[here], block.spent_PG2[here], hidden_WGUD.flatten(1, 2))


def _best(big_P: Tensor, promise_PGU: Tensor, width: int) -> Tensor:
    """The rows that each group keeps, [W, G]: a quota of every number of big layers."""
    strata = [(big_P == big).nonzero()[:, 0].to(promise_PGU.device, non_blocking=True) for big in big_P.unique()]
    quotas = _divide(width, [len(rows) for rows in strata])
    return torch.cat([rows[_keep(promise_PGU[rows], quota)] for rows, quota in zip(strata, quotas, strict=True)])


def _divide(width: int, candidates: list[int]) -> list[int]:
    """Divide the width between strata: at least one each, no more than it has, else as equally as can be."""
    quotas = [0] * len(candidates)
    for served, stratum in enumerate(sorted(range(len(candidates)), key=lambda each: candidates[each])):
        fair = (width - sum(quotas)) // (len(candidates) - served)
        quotas[stratum] = min(candidates[stratum], max(1, fair))
    return quotas


def _keep(promise_MGU: Tensor, quota: int) -> Tensor:
    """The candidates that each group keeps, [quota, G].

    A token alone keeps the best. A group keeps those that serve it best together: each in turn is the one by which the
    sum over the tokens of the lowest promise falls most.
    """
    if promise_MGU.shape[-1] == 1:
        return promise_MGU[..., 0].sort(dim=0, stable=True).indices[:quota]
    groups = torch.arange(promise_MGU.shape[1], device=promise_MGU.device)
    lowest_GU = promise_MGU.new_full(promise_MGU.shape[1:], torch.finfo(promise_MGU.dtype).max / promise_MGU.shape[2])
    left_MG = torch.zeros(promise_MGU.shape[:2], device=promise_MGU.device)
    chosen = []
    for _ in range(quota):
        chosen_G = (torch.minimum(promise_MGU, lowest_GU).sum(-1) + left_MG).argmin(0)
        lowest_GU = torch.minimum(lowest_GU, promise_MGU[chosen_G, groups])
        left_MG[chosen_G, groups] = torch.inf
        chosen.append(chosen_G)
    return torch.stack(chosen)
