"""Reductions: what a search keeps of the losses that stream by.

A leaf is a token on a route. Each reduction says which leaves can still matter to it (`lower`, `bar_QN`). A leaf that
matters to none does not run the full head. `update` takes in the losses of the others, and `columns` reads the budgets
off at the end (docs/adding-a-reduction.md).

Shape letters: P routes in a block, N tokens that are searched together, Q cells, S draws, R routes, M leaves,
D hidden, K budgets, B sequences, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from duollm.oracle.budgets import Budget, Cells, Exactly, Frontier
from duollm.oracle.contexts import Batch
from duollm.routes.sampling import draw_route_ids


@dataclass(frozen=True)
class Leaves:
    """A block of leaves: N tokens, each on P routes.

    Attributes:
        rows_N: indices of the tokens in the batch.
        ids_PN: their routes.
        cell_PN: the cells of the routes, as indices into `Cells.spent`.
        hidden_PND: normalised final hidden states.
        known: logits of the block that were computed already, [P, N], by the identity of their embeddings.
    """

    rows_N: Tensor
    ids_PN: Tensor
    cell_PN: Tensor
    hidden_PND: Tensor
    known: dict[int, Tensor] = field(default_factory=dict)

    def logits(self, label_ND: Tensor) -> Tensor:
        """Return the logits [P, N], float32, of labels whose embeddings are given for the whole batch."""
        if id(label_ND) not in self.known:
            self.known[id(label_ND)] = torch.einsum("pnd,nd->pn", self.hidden_PND, label_ND[self.rows_N]).float()
        return self.known[id(label_ND)]


@dataclass(frozen=True)
class Entered:
    """M leaves of a block, with exact log-normalisers.

    Attributes:
        routes_M, tokens_M: their places in the block, along P and N.
        ids_M, cell_M: their routes and the cells of these.
    """

    leaves: Leaves
    routes_M: Tensor
    tokens_M: Tensor
    ids_M: Tensor
    cell_M: Tensor
    hidden_MD: Tensor
    log_z_M: Tensor

    def nll(self, label_ND: Tensor) -> Tensor:
        """Return the losses [M] of labels whose embeddings are given for the whole batch."""
        logit_PN = self.leaves.known.get(id(label_ND))
        if logit_PN is not None:
            return self.log_z_M - logit_PN[self.routes_M, self.tokens_M]
        return self.log_z_M - (self.hidden_MD * label_ND[self.leaves.rows_N[self.tokens_M]]).sum(-1)


class Reduction:
    """Keeps something of the losses of leaves. This base class runs the full head on every leaf.

    Attributes:
        every_route: whether the reduction makes sense only if every route is tried.
        left_to_right: whether it also serves context "committed".
        parts: the reductions of which this one is made, if it is; they see the leaves in its place.
    """

    every_route = False
    left_to_right = True
    parts: "Sequence[Reduction]" = ()

    def begin(self, batch: Batch, cells: Cells, budgets: Sequence[Budget], generator: torch.Generator) -> None:
        """Prepare for the search of a batch. Random numbers are drawn here."""
        self.batch, self.cells = batch, cells
        for part in self.parts:
            part.begin(batch, cells, budgets, generator)

    def start(self, rows_N: Tensor) -> None:
        """Forget what was kept; leaves of these tokens of the batch follow."""
        self.rows_N = rows_N
        for part in self.parts:
            part.start(rows_N)

    @property
    def bar_QN(self) -> Tensor:
        """The loss at or below which a leaf matters."""
        shape = (len(self.cells.spent), len(self.rows_N))
        return torch.full(shape, torch.inf, dtype=torch.float32, device=self.rows_N.device)

    def lower(self, leaves: Leaves, log_z_PN: Tensor) -> Tensor:
        """Return a lower bound [P, N] of what would be kept of the leaves, given one of their log-normalisers.

        The bound is +inf for a leaf that does not count, and -inf for one that is needed in any case.
        """
        return torch.full_like(log_z_PN, -torch.inf)

    def update(self, entered: Entered) -> None:
        """Take in leaves; a token may come under many routes."""
        raise NotImplementedError

    def columns(self, frontier: Frontier) -> dict[str, Tensor]:
        """Return what was kept by name, each [K, B, T]."""
        return {}


class BestSoFar(Reduction):
    """The lowest nll of each token in each cell, and the route that reached it; ties go to the smaller id.

    Attributes:
        label_ND: the head's embeddings of the labels that choose.
        scored_ND: embeddings of other labels, on which the chosen routes are scored too.
        nll_QN: the lowest losses, float32; +inf until a route of the cell was seen.
        ids_QN: their route ids, int64.
        score_QN: the nll of the other labels under the same routes.
    """

    def __init__(self, label_ND: Tensor | None = None, scored_ND: Tensor | None = None) -> None:
        self.given_ND, self.scored_ND = label_ND, scored_ND

    def begin(self, batch: Batch, cells: Cells, budgets: Sequence[Budget], generator: torch.Generator) -> None:
        """Take the batch's own labels unless others were given."""
        super().begin(batch, cells, budgets, generator)
        self.label_ND = batch.label_ND if self.given_ND is None else self.given_ND

    def start(self, rows_N: Tensor) -> None:
        """Forget what was kept; leaves of these tokens of the batch follow."""
        super().start(rows_N)
        self.nll_QN = torch.full(
            (len(self.cells.spent), len(rows_N)), torch.inf, dtype=torch.float32, device=rows_N.device
        )
        self.ids_QN = torch.full_like(self.nll_QN, torch.iinfo(torch.long).max, dtype=torch.long)
        self.score_QN = self.nll_QN.clone()

    @property
    def bar_QN(self) -> Tensor:
        """The best so far: a leaf above it cannot become the best."""
        return self.nll_QN

    def lower(self, leaves: Leaves, log_z_PN: Tensor) -> Tensor:
        """Bound the nll from below."""
        return log_z_PN - leaves.logits(self.label_ND)

    def update(self, entered: Entered) -> None:
        """Take in leaves; a token may come under many routes."""
        self._keep_lowest(entered, entered.nll(self.label_ND))

    def _keep_lowest(self, entered: Entered, nll_M: Tensor) -> None:
        place_M = entered.cell_M * self.nll_QN.shape[1] + entered.tokens_M
        best, ids = self.nll_QN.view(-1), self.ids_QN.view(-1)
        lowest = best.scatter_reduce(0, place_M, nll_M, "amin")
        # Nothing is indexed by a mask: its size would have to be asked of the device.
        worst = torch.iinfo(torch.long).max
        ids.masked_fill_(lowest < best, worst)
        reached_M = nll_M == lowest[place_M]
        ids.scatter_reduce_(0, place_M, entered.ids_M.where(reached_M, worst), "amin")
        best.copy_(lowest)
        if self.scored_ND is not None:
            won_M = reached_M & (entered.ids_M == ids[place_M])
            scored_M, score = entered.nll(self.scored_ND).where(won_M, torch.inf), self.score_QN.view(-1)
            new = torch.full_like(score, torch.inf).scatter_reduce_(0, place_M, scored_M, "amin")
            score.copy_(new.where(new < torch.inf, score))

    def columns(self, frontier: Frontier) -> dict[str, Tensor]:
        """Return the lowest nll within every budget and its route."""
        return {"nll": frontier.read(self.nll_QN, self.nll_QN), "route": frontier.read(self.nll_QN, self.ids_QN)}


class RandomRoutes(BestSoFar):
    """The best of some random routes per token and budget "exactly k": the oracle with few tries."""

    every_route = True
    left_to_right = False

    def __init__(self, routes: int) -> None:
        super().__init__()
        self.routes = routes

    def begin(self, batch: Batch, cells: Cells, budgets: Sequence[Budget], generator: torch.Generator) -> None:
        """Draw the routes, with replacement."""
        super().begin(batch, cells, budgets, generator)
        shape = (len(batch.labels_N), self.routes)
        bigs = sorted({budget.big for budget in budgets if isinstance(budget, Exactly)})
        nothing = torch.full((len(batch.labels_N), 1), -1, device=generator.device)
        drawn = [nothing, *(draw_route_ids(cells.space, big, shape, generator) for big in bigs)]
        self._drawn_NS = torch.cat(drawn, dim=1).sort(-1).values

    def start(self, rows_N: Tensor) -> None:
        """Forget what was kept; leaves of these tokens of the batch follow."""
        super().start(rows_N)
        self._drawn_here = self._drawn_NS[rows_N]

    def lower(self, leaves: Leaves, log_z_PN: Tensor) -> Tensor:
        """Return the bound of `BestSoFar` for drawn routes, +inf for others."""
        ids_NP = leaves.ids_PN.T.contiguous()
        place_NP = torch.searchsorted(self._drawn_here, ids_NP).clamp(max=self._drawn_here.shape[1] - 1)
        leaves.known[id(self)] = competes_PN = (self._drawn_here.gather(1, place_NP) == ids_NP).T
        return super().lower(leaves, log_z_PN).where(competes_PN, torch.inf)

    def update(self, entered: Entered) -> None:
        """Take in leaves. Only those on drawn routes count."""
        competes_M = entered.leaves.known[id(self)][entered.routes_M, entered.tokens_M]
        self._keep_lowest(entered, entered.nll(self.label_ND).where(competes_M, torch.inf))

    def columns(self, frontier: Frontier) -> dict[str, Tensor]:
        """Return the lowest nll among the drawn routes."""
        return {"random_nll": frontier.read(self.nll_QN, self.nll_QN)}


class LeafTable(Reduction):
    """The losses of some tokens under every route, for fixed patterns and order statistics.

    Attributes:
        label_ND: the head's embeddings of the labels; None: the batch's own.
        counted_M: indices of the tokens; here M counts tokens.
        nll_MR: losses, float32, nats; nan if a route was not searched. A view: one more row takes what does not count.
    """

    every_route = True
    left_to_right = False

    def __init__(self, counted_N: Tensor, routes: int, label_ND: Tensor | None = None) -> None:
        self.label_ND = label_ND
        self.counted_N, self.counted_M = counted_N, counted_N.nonzero()[:, 0]
        shape = (len(self.counted_M) + 1, routes)
        self._rows = torch.full(shape, torch.nan, dtype=torch.float32, device=counted_N.device)
        self.nll_MR = self._rows[:-1]

    def lower(self, leaves: Leaves, log_z_PN: Tensor) -> Tensor:
        """Return -inf for the tokens of the table, because every route is needed, and +inf for other tokens."""
        return torch.where(self.counted_N, -torch.inf, torch.inf).to(log_z_PN).expand(log_z_PN.shape)

    def update(self, entered: Entered) -> None:
        """Take in the leaves of the table's tokens."""
        row_N = (self.counted_N.cumsum(0) - 1).where(self.counted_N, len(self.counted_M))
        nll_M = entered.nll(self.batch.label_ND if self.label_ND is None else self.label_ND)
        self._rows[row_N[entered.tokens_M], entered.ids_M] = nll_M
