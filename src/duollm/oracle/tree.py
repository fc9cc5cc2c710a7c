"""Walks the tree of routes: every prefix of choices is computed once.

A node at depth l is a prefix of l choices; its content is the hidden states of all tokens under that
prefix. All nodes of one depth that fit the row budget are expanded together (wide, so that the
matrix products are large); a wider block is split and its parts are walked to the leaves one after
the other (deep, so that memory stays bounded).

Shape letters: P prefixes (nodes in a block), N tokens, D hidden, C branches.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from duollm.models.branch import Branch
from duollm.models.modeling_duo import DuoDecoderLayer, DuoModel
from duollm.oracle.ffn import add_ffn
from duollm.routes.space import RouteSpace

Attend = Callable[[DuoDecoderLayer, Tensor], Tensor]
"""Attention output [P, N, D] of one layer for normalised states [P, N, D]."""


def decoder_layers(model: DuoModel) -> list[DuoDecoderLayer]:
    """The layers, first to last."""
    return cast(list[DuoDecoderLayer], list(model.layers))


def attended(layer: DuoDecoderLayer, entered_PND: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
    """The first half of a layer: hidden states after attention, and the same normalised for the FFN."""
    attended_PND = entered_PND + attend(layer, layer.input_layernorm(entered_PND))
    return attended_PND, layer.post_attention_layernorm(attended_PND)


def branch_out(layer: DuoDecoderLayer, entered_PND: Tensor, attend: Attend, branches: Sequence[Branch]) -> Tensor:
    """Send hidden states through a layer once per branch, [P, C, N, D]."""
    attended_PND, states_PND = attended(layer, entered_PND, attend)
    prefixes, tokens, width = entered_PND.shape
    children_PCND = attended_PND.new_empty(prefixes, len(branches), tokens, width)
    for digit, branch in enumerate(branches):
        if branch == Branch.SKIP:
            children_PCND[:, digit] = entered_PND if layer.skip_scope == "layer" else attended_PND
        else:
            ffn = layer.mlp.small if branch == Branch.SMALL else layer.mlp.big
            children_PCND[:, digit] = add_ffn(ffn, states_PND, attended_PND)
    return children_PCND


@dataclass(frozen=True)
class Block:
    """Nodes of one depth; leaves when the depth is L.

    Attributes:
        ids_P: the prefixes as numbers in base C, first layer most significant; route ids at the leaves.
        spent_P2: how many of the choices so far are small, and how many big.
        hidden_PND: hidden states after the layers walked so far.
    """

    ids_P: Tensor
    spent_P2: Tensor
    hidden_PND: Tensor

    @classmethod
    def root(cls, hidden_ND: Tensor) -> "Block":
        """The empty prefix, with the embeddings of the tokens."""
        ids_P = torch.zeros(1, dtype=torch.long, device=hidden_ND.device)
        return cls(ids_P, ids_P.new_zeros(1, 2), hidden_ND[None])

    @property
    def rows(self) -> int:
        """Number of hidden vectors in the block."""
        return self.hidden_PND.shape[0] * self.hidden_PND.shape[1]

    def parts(self, max_rows: int) -> "list[Block]":
        """Split along the prefixes so that each part has at most `max_rows` rows (at least one prefix)."""
        prefixes = max(1, max_rows // self.hidden_PND.shape[1])
        pieces = (self.ids_P.split(prefixes), self.spent_P2.split(prefixes), self.hidden_PND.split(prefixes))
        return [Block(*piece) for piece in zip(*pieces, strict=True)]


@dataclass(frozen=True)
class Tree:
    """The routes of `space` that end in one of the wanted cells, over a model's layers.

    Attributes:
        wanted_Q2: (small, big) layers of the wanted cells; prefixes that reach none of them are cut.
        max_rows: how many hidden vectors a block may hold before it is split.
    """

    model: DuoModel
    space: RouteSpace
    wanted_Q2: Tensor
    max_rows: int

    def leaves(self, hidden_ND: Tensor, attend: Attend) -> Iterator[Block]:
        """Yield blocks of leaves, route ids ascending, from the embeddings [N, D] of the tokens."""
        yield from self._walk(Block.root(hidden_ND), 0, attend)

    def _walk(self, block: Block, depth: int, attend: Attend) -> Iterator[Block]:
        if depth == self.space.num_layers:
            yield block
            return
        for part in block.parts(self.max_rows):
            yield from self._walk(self._expand(part, depth, attend), depth + 1, attend)

    def _expand(self, block: Block, depth: int, attend: Attend) -> Block:
        """Send a block through layer `depth`, once per branch."""
        children_PCND = branch_out(decoder_layers(self.model)[depth], block.hidden_PND, attend, self.space.branches)
        device = block.ids_P.device
        digits_C = torch.arange(self.space.base, device=device)
        spends_C2 = torch.tensor([[b == Branch.SMALL, b == Branch.BIG] for b in self.space.branches], device=device)
        children = Block(
            (block.ids_P[:, None] * self.space.base + digits_C).flatten(),
            (block.spent_P2[:, None] + spends_C2).flatten(0, 1),
            children_PCND.flatten(0, 1),
        )
        return self._cut(children, remaining=self.space.num_layers - depth - 1)

    def _cut(self, block: Block, remaining: int) -> Block:
        """Drop prefixes from which no wanted cell can be reached."""
        left_PQ2 = self.wanted_Q2 - block.spent_P2[:, None]
        reachable_PQ = (left_PQ2 >= 0).all(-1) & (left_PQ2.sum(-1) <= remaining)
        if Branch.SKIP not in self.space.branches:
            reachable_PQ &= left_PQ2.sum(-1) == remaining
        kept_P = reachable_PQ.any(-1)
        if kept_P.all():
            return block
        return Block(block.ids_P[kept_P], block.spent_P2[kept_P], block.hidden_PND[kept_P])
