"""Walks the tree of routes: every prefix of choices is computed once.

A node at depth l is a prefix of l choices. It holds the hidden states of all tokens under that prefix. All nodes of one
depth are expanded together if they fit the row budget, so that the matrix products are large. The children of a wider
block stay apart by branch and are walked to the leaves one after another, so that memory stays bounded and nothing is
copied.

Shape letters: P prefixes (nodes in a block), N tokens, G groups of them, D hidden, C branches, Q cells.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
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


def follow(model: DuoModel, hidden_PND: Tensor, routes_PNL: Tensor, attend: Attend) -> Iterator[Tensor]:
    """Send hidden states along given routes; yield them as they enter the first layer and after every layer."""
    yield hidden_PND
    for layer, choice_PN in zip(decoder_layers(model), routes_PNL.unbind(-1), strict=True):
        attention_PND = attend(layer, layer.input_layernorm(hidden_PND))
        output_PND = layer.branch(choice_PN, *layer.attended(hidden_PND, attention_PND))
        if layer.skip_scope == "layer":
            output_PND = output_PND.where((choice_PN != Branch.SKIP)[..., None], hidden_PND)
        hidden_PND = output_PND
        yield hidden_PND


Leads = Callable[[Tensor], Tensor]
"""Whether numbers of small and big layers [P, G, 2] can still become wanted ones, [P]."""

LEAVES = 4
"""How many blocks of leaves are handed on together: each costs many small steps, whatever its size."""


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

    def expand(
        self, layer: DuoDecoderLayer, branches: Sequence[Branch], attend: Attend, leads: Leads | None = None
    ) -> "list[Prefixes]":
        """Send the prefixes through a layer; return a block of children for every branch.

        Args:
            leads: children that lead nowhere are not computed.
        """
        attended_PND, states_PND = layer.attended(
            self.hidden_PND, attend(layer, layer.input_layernorm(self.hidden_PND))
        )
        children = []
        for digit, branch in enumerate(branches):
            spends_2 = self.spent_PG2.new_tensor([branch == Branch.SMALL, branch == Branch.BIG])
            ids_PG, spent_PG2 = self.ids_PG * len(branches) + digit, self.spent_PG2 + spends_2
            kept_P = None if leads is None else leads(spent_PG2)
            every = kept_P is None or bool(kept_P.all())
            if branch == Branch.SKIP and layer.skip_scope == "layer":
                output_PND = self.hidden_PND if every else self.hidden_PND[kept_P]
            else:
                halfway = (attended_PND, states_PND) if every else (attended_PND[kept_P], states_PND[kept_P])
                output_PND = layer.branch(branch, *halfway, fused=True)
            kept = (ids_PG, spent_PG2) if every else (ids_PG[kept_P], spent_PG2[kept_P])
            children.append(Prefixes(*kept, output_PND))
        return children


def join(blocks: list[Prefixes]) -> Prefixes:
    """Put blocks of one depth together."""
    if len(blocks) == 1:
        return blocks[0]
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
        """Yield blocks of leaves from the embeddings [N, D] of the tokens."""
        waiting: list[Prefixes] = []
        for block in self._walk(Prefixes.root(hidden_ND), 0, attend):
            if waiting and _rows([*waiting, block]) > LEAVES * self.max_rows:
                yield join(waiting)
                waiting = []
            waiting.append(block)
        yield join(waiting)

    def _walk(self, block: Prefixes, depth: int, attend: Attend) -> Iterator[Prefixes]:
        if depth == self.space.num_layers:
            yield block
            return
        layer, remaining = decoder_layers(self.model)[depth], self.space.num_layers - depth - 1
        for part in block.parts(self.max_rows):
            children = part.expand(layer, self.space.branches, attend, partial(self._leads, remaining))
            if _rows(children) <= self.max_rows:
                children = [join(children)]
            for child in children:
                yield from self._walk(child, depth + 1, attend)

    def _leads(self, remaining: int, spent_PG2: Tensor) -> Tensor:
        """Whether a wanted cell can be reached with this many layers left, [P]."""
        left_PQ2 = self.wanted_Q2 - spent_PG2
        reachable_PQ = (left_PQ2 >= 0).all(-1) & (left_PQ2.sum(-1) <= remaining)
        if Branch.SKIP not in self.space.branches:
            reachable_PQ &= left_PQ2.sum(-1) == remaining
        return reachable_PQ.any(-1)


def _rows(blocks: Sequence[Prefixes]) -> int:
    """The number of hidden vectors."""
    return sum(len(each.hidden_PND) * each.hidden_PND.shape[1] for each in blocks)
