"""Walks the tree of routes: every prefix of choices is computed once.

A node at depth l is a prefix of l choices. It holds the hidden states of all tokens under that prefix. All nodes of one
depth are expanded together if they fit the row budget, so that the matrix products are large. A wider block is split,
and its parts are walked to the leaves one after another, so that memory stays bounded.

Shape letters: P prefixes (nodes in a block), N tokens, G groups of them, D hidden, C branches, Q cells.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from duollm.models.branch import Branch
from duollm.models.modeling_duo import DuoDecoderLayer, DuoModel
from duollm.oracle.contexts import Attend
from duollm.routes.space import RouteSpace


def decoder_layers(model: DuoModel) -> list[DuoDecoderLayer]:
    """Return the layers, first to last."""
    return cast(list[DuoDecoderLayer], list(model.layers))


def branch_out(layer: DuoDecoderLayer, entered_PND: Tensor, attend: Attend, branches: Sequence[Branch]) -> Tensor:
    """Send hidden states through a layer once per branch, [P, C, N, D]."""
    attended_PND, states_PND = layer.attended(entered_PND, attend(layer, layer.input_layernorm(entered_PND)))
    prefixes, tokens, width = entered_PND.shape
    children_PCND = attended_PND.new_empty(prefixes, len(branches), tokens, width)
    for digit, branch in enumerate(branches):
        bypassed = branch == Branch.SKIP and layer.skip_scope == "layer"
        children_PCND[:, digit] = (
            entered_PND if bypassed else layer.branch(branch, attended_PND, states_PND, fused=True)
        )
    return children_PCND


@dataclass(frozen=True)
class Prefixes:
    """P prefixes of one depth; G groups of tokens may each have their own. At depth L they are leaves.

    Attributes:
        ids_PG: numbers in base C, first layer most significant; route ids at the leaves.
        spent_PG2: numbers of small and of big layers so far.
        hidden_PND: hidden states after the layers walked so far.
    """

    ids_PG: Tensor
    spent_PG2: Tensor
    hidden_PND: Tensor

    @classmethod
    def root(cls, hidden_ND: Tensor, groups: int = 1) -> "Prefixes":
        """Return the empty prefix, with the embeddings of the tokens."""
        ids_1G = torch.zeros(1, groups, dtype=torch.long, device=hidden_ND.device)
        return cls(ids_1G, ids_1G.new_zeros(1, groups, 2), hidden_ND[None])

    def where(self, kept_P: Tensor) -> "Prefixes":
        """Return some of the prefixes."""
        if kept_P.all():
            return self
        return Prefixes(self.ids_PG[kept_P], self.spent_PG2[kept_P], self.hidden_PND[kept_P])

    def parts(self, max_rows: int) -> "list[Prefixes]":
        """Split into parts of at most `max_rows` hidden vectors each (at least one prefix)."""
        prefixes = max(1, max_rows // self.hidden_PND.shape[1])
        pieces = (self.ids_PG.split(prefixes), self.spent_PG2.split(prefixes), self.hidden_PND.split(prefixes))
        return [Prefixes(*piece) for piece in zip(*pieces, strict=True)]

    def expand(self, layer: DuoDecoderLayer, branches: Sequence[Branch], attend: Attend) -> "Prefixes":
        """Send the prefixes through a layer, once per branch."""
        device = self.ids_PG.device
        digits_C1 = torch.arange(len(branches), device=device)[:, None]
        spends_C12 = torch.tensor([[[each == Branch.SMALL, each == Branch.BIG]] for each in branches], device=device)
        return Prefixes(
            (self.ids_PG[:, None] * len(branches) + digits_C1).flatten(0, 1),
            (self.spent_PG2[:, None] + spends_C12).flatten(0, 1),
            branch_out(layer, self.hidden_PND, attend, branches).flatten(0, 1),
        )


def join(blocks: list[Prefixes]) -> Prefixes:
    """Put blocks of one depth together."""
    fields = zip(*((each.ids_PG, each.spent_PG2, each.hidden_PND) for each in blocks), strict=True)
    return Prefixes(*(torch.cat(each) for each in fields))


@dataclass(frozen=True)
class Tree:
    """The routes of `space` that end in one of the wanted cells, over a model's layers.

    Attributes:
        wanted_Q2: (small, big) layers of the wanted cells. Prefixes that reach none of them are cut.
        max_rows: number of hidden vectors above which a block is split.
    """

    model: DuoModel
    space: RouteSpace
    wanted_Q2: Tensor
    max_rows: int

    def leaves(self, hidden_ND: Tensor, attend: Attend) -> Iterator[Prefixes]:
        """Yield blocks of leaves, route ids ascending, from the embeddings [N, D] of the tokens."""
        yield from self._walk(Prefixes.root(hidden_ND), 0, attend)

    def _walk(self, block: Prefixes, depth: int, attend: Attend) -> Iterator[Prefixes]:
        if depth == self.space.num_layers:
            yield block
            return
        for part in block.parts(self.max_rows):
            yield from self._walk(self._expand(part, depth, attend), depth + 1, attend)

    def _expand(self, part: Prefixes, depth: int, attend: Attend) -> Prefixes:
        """Send prefixes through layer `depth`; drop those from which no wanted cell can be reached."""
        children = part.expand(decoder_layers(self.model)[depth], self.space.branches, attend)
        remaining = self.space.num_layers - depth - 1
        left_PQ2 = self.wanted_Q2 - children.spent_PG2
        reachable_PQ = (left_PQ2 >= 0).all(-1) & (left_PQ2.sum(-1) <= remaining)
        if Branch.SKIP not in self.space.branches:
            reachable_PQ &= left_PQ2.sum(-1) == remaining
        return children.where(reachable_PQ.any(-1))
