"""Tries routes on tokens in one context, and shows their losses to the reductions.

In contexts "reference" and "committed" a token's route does not affect the other tokens, so every token may try its own
routes. In "shared" the tokens of a sequence try the same routes together.

Shape letters: P routes tried side by side, N tokens, G groups of tokens that try the same routes, M leaves,
L layers, D hidden, Q cells, K budgets, B sequences, T tokens given.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from duollm.models.branch import Branch
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.oracle.budgets import AtMost, Budget, Cells, Exactly, Frontier
from duollm.oracle.contexts import Attend, Batch
from duollm.oracle.head import LARGE, HeadBound, log_normaliser
from duollm.oracle.reductions import Entered, Leaves, Reduction
from duollm.oracle.tree import Rows, follow

# The bound and the exact loss are rounded differently; a leaf this close to the best is evaluated too.
_ROUNDING = 1e-4


@dataclass
class Trial:
    """Tokens whose routes are compared, and what was kept of the routes tried so far.

    Attributes:
        cells: the route space and its cells.
        rows_N: indices of the tokens in the batch.
        positions: positions of the tokens in their sequences.
        attend: the context.
        together: number of consecutive tokens that try the same routes (a whole sequence in "shared", else 1).
        rows: numbers of hidden vectors to send through a layer, and to enter, at a time.
        bound: a lower bound of the log-normaliser at these tokens; None runs the full head on every leaf.
        reductions: the reductions; the first one keeps the best so far.
        evaluated: number of leaves that ran the full head.
    """

    batch: Batch
    cells: Cells
    rows_N: Tensor
    positions: range
    attend: Attend
    together: int
    rows: Rows
    bound: HeadBound | None
    reductions: Sequence[Reduction]
    evaluated: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.hidden_ND = self.batch.hidden_BTD.flatten(0, 1)[self.rows_N]
        self.counted_N = ~self.batch.padding_BT.flatten()[self.rows_N]
        self._kept = [part for each in self.reductions for part in each.parts or [each]]

    @property
    def model(self) -> DuoForCausalLM:
        """The model whose routes are tried."""
        return self.batch.model

    @property
    def groups(self) -> int:
        """The number G of groups of tokens that each choose which routes to try."""
        return len(self.rows_N) // self.together

    def try_routes(self, ids_PG: Tensor) -> None:
        """Run the groups on their routes and enter the losses."""
        for part_PG in ids_PG.cpu().split(max(1, self.rows.walked // len(self.rows_N))):
            routes_PGL = self.cells.space.decode(part_PG)
            spent_PG2 = torch.stack([(routes_PGL == each).sum(-1) for each in (Branch.SMALL, Branch.BIG)], dim=-1)
            self.enter(part_PG, spent_PG2, deque(self.follow(part_PG), maxlen=1).pop())

    def follow(self, ids_PG: Tensor) -> Iterator[Tensor]:
        """Yield the hidden states [P, N, D] that enter the first layer, and those after every layer."""
        routes_PGL = self.cells.space.decode(ids_PG)
        yield from follow(self.model.model, self.hidden_ND.expand(len(ids_PG), -1, -1), routes_PGL, self.attend)

    def _spread(self, values_PG: Tensor) -> Tensor:
        """Send values of groups from the CPU and repeat them for their tokens, [P, N]."""
        values_PG = values_PG.to(self.rows_N.device, non_blocking=True)
        return values_PG.repeat_interleave(len(self.rows_N) // values_PG.shape[1], dim=1)

    def enter(self, ids_PG: Tensor, spent_PG2: Tensor, hidden_PND: Tensor) -> None:
        """Take in routes, with what they spend (both on the CPU) and their hidden states before the final norm.

        A leaf's loss is its log-normaliser minus its label's logit. The logit is cheap, and the log-normaliser has a
        cheap lower bound. A leaf whose bound is above what every reduction has kept does not run the full head. If the
        vocabulary is large, those that pass are tried against a closer bound first.
        """
        ids_PN, cell_PN = self._spread(ids_PG), self._spread(self.cells.index(*spent_PG2.unbind(-1)))
        final_PND = self.model.model.norm(hidden_PND)
        leaves = Leaves(self.rows_N, ids_PN, cell_PN, final_PND)
        if self.bound is None:
            bound_PN = torch.full(final_PND.shape[:2], -torch.inf, dtype=torch.float32, device=final_PND.device)
        else:
            bound_PN = self.bound(final_PND) - _ROUNDING
        lower = [each.lower(leaves, bound_PN) for each in self._kept]
        left_PN = torch.ones_like(bound_PN, dtype=torch.bool)
        # First the most promising leaf of each cell, which lowers the bar; then all that still pass it.
        self._enter(leaves, lower, left_PN, _most_promising)
        if self.bound is not None and len(self.model.lm_head.weight) >= LARGE:
            place = self._chosen(leaves, lower, left_PN, _still_possible)
            closer_M = self.bound.closer(self.model, final_PND[place]) - _ROUNDING
            bound_PN[place] = torch.maximum(bound_PN[place], closer_M)
            lower = [each.lower(leaves, bound_PN.where(left_PN, torch.inf)) for each in self._kept]
            self._enter(leaves, lower, left_PN, _most_promising)
        self._enter(leaves, lower, left_PN, _still_possible)

    def _chosen(
        self, leaves: Leaves, lower: Sequence[Tensor], left_PN: Tensor, choose: Callable[..., Tensor]
    ) -> tuple[Tensor, ...]:
        """The places of the leaves, among those that are left, that some reduction chooses by their lower bounds."""
        chosen_PN = torch.zeros_like(left_PN)
        for each, lower_PN in zip(self._kept, lower, strict=True):
            chosen_PN |= choose(lower_PN, leaves.cell_PN, each.bar_QN)
        return (chosen_PN & left_PN).nonzero(as_tuple=True)

    def _enter(self, leaves: Leaves, lower: Sequence[Tensor], left_PN: Tensor, choose: Callable[..., Tensor]) -> None:
        """Run the full head on leaves to choose, and enter them; they are no longer left."""
        routes_M, tokens_M = place = self._chosen(leaves, lower, left_PN, choose)
        hidden_MD = leaves.hidden_PND[place]
        log_z_M = log_normaliser(self.model, hidden_MD)
        self.evaluated += len(log_z_M)
        entered = Entered(leaves, routes_M, tokens_M, leaves.ids_PN[place], leaves.cell_PN[place], hidden_MD, log_z_M)
        for each in self._kept:
            each.update(entered)
        left_PN[place] = False

    def estimate(self, hidden_PND: Tensor) -> Tensor:
        """Return a lower bound [P, N] of the nll of tokens with these hidden states after the last layer."""
        final_PND = self.model.model.norm(hidden_PND)
        if self.bound is None:
            log_z_PN = log_normaliser(self.model, final_PND.flatten(0, 1)).view(final_PND.shape[:2])
        else:
            log_z_PN = self.bound(final_PND)
        return log_z_PN - torch.einsum("pnd,nd->pn", final_PND, self.batch.label_ND[self.rows_N])

    def found(self, budget: Budget) -> tuple[Tensor, Tensor]:
        """Return the lowest nll of every token within a budget so far, and its route id, each [N]."""
        nobody_1N = torch.zeros_like(self.counted_N)[None]
        found = self.reductions[0].columns(Frontier([budget], self.cells, nobody_1N))
        return found["nll"][0, 0], found["route"][0, 0]


def _most_promising(lower_PN: Tensor, cell_PN: Tensor, bar_QN: Tensor) -> Tensor:
    """Where the lower bound is the block's lowest for its cell and token, and could pass the bar."""
    lowest_QN = torch.full_like(bar_QN, torch.inf)
    lowest_QN.scatter_reduce_(0, cell_PN, lower_PN, "amin")
    return (lower_PN == lowest_QN.gather(0, cell_PN)) & _still_possible(lower_PN, cell_PN, bar_QN)


def _still_possible(lower_PN: Tensor, cell_PN: Tensor, bar_QN: Tensor) -> Tensor:
    """Where the lower bound does not exceed the bar."""
    return (lower_PN <= bar_QN.gather(0, cell_PN)) & (lower_PN < torch.inf)


class Method:
    """Decides which routes the tokens of a trial try: at least one within each budget.

    Attributes:
        every_route: whether all routes are tried.
        least: the least values of settings.
    """

    every_route: ClassVar[bool] = False
    least: ClassVar[tuple[tuple[str, int], ...]] = ()

    def begin(self, budgets: Sequence[Budget], cells: Cells, shape_BT: torch.Size) -> None:
        """Check the settings and prepare for a whole search.

        Raises:
            ValueError: a budget needs every route tried, or settings are impossible.
        """
        for budget in budgets:
            if not self.every_route and not isinstance(budget, Exactly | AtMost):
                raise ValueError(f"approximate methods take budgets Exactly and AtMost, got {budget}; use 'exact'")
        for name, least in self.least:
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    def __call__(self, trial: Trial, budgets: Sequence[Budget], generator: torch.Generator) -> None:
        """Try routes."""
        raise NotImplementedError
