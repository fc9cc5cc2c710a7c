"""Walks the tree of routes: every prefix of choices is computed once.

A node at depth d is a prefix of d choices: of the branches of the first d groups of layers. It holds the hidden states
of all tokens under that prefix, before the layer that asks for the next choice. All nodes of one depth are expanded
together if they fit the row budget, so that the matrix products are large. A wider block is split, and its parts are
walked to the leaves one after another, so that memory stays bounded.

Shape letters: P prefixes (nodes in a block), N tokens, G groups of them, D hidden, C branches, Q cells.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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


def through(layer: DuoDecoderLayer, hidden_PND: Tensor, choice_PN: Tensor, attend: Attend) -> Tensor:
    """Send hidden states through a layer, each on its given branch, [P, N, D]."""
    if layer.skip_scope == "layer" and (stays_P := (choice_PN == Branch.SKIP).all(-1)).any():
        output_PND = hidden_PND.clone()
        if not stays_P.all():
            output_PND[~stays_P] = through(layer, hidden_PND[~stays_P], choice_PN[~stays_P], attend)
        return output_PND
    attention_PND = attend(layer, layer.input_layernorm(hidden_PND))
    output_PND = layer.branch(choice_PN, *layer.attended(hidden_PND, attention_PND))
    if layer.skip_scope == "layer":
        output_PND = output_PND.where((choice_PN != Branch.SKIP)[..., None], hidden_PND)
    return output_PND


@dataclass(frozen=True)
class Prefixes:
    """P prefixes of one depth; G groups of tokens may each have their own. At the last depth they are leaves.

    Attributes:
        ids_PG: numbers in base C, first choice most significant; route ids at the leaves.
        spent_PG2: numbers of small and of big layers in what was chosen so far and in all fixed layers.
        hidden_PND: hidden states after the layers walked so far.
    """

    ids_PG: Tensor
    spent_PG2: Tensor
    hidden_PND: Tensor

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

    def expand(self, layer: DuoDecoderLayer, branches: Sequence[Branch], attend: Attend, group_size: int) -> "Prefixes":
        """Send the prefixes through the first layer of a group of this many, once per branch."""
        device = self.ids_PG.device
        digits_C1 = torch.arange(len(branches), device=device)[:, None]
        spends_C12 = torch.tensor([[[each == Branch.SMALL, each == Branch.BIG]] for each in branches], device=device)
        return Prefixes(
            (self.ids_PG[:, None] * len(branches) + digits_C1).flatten(0, 1),
            (self.spent_PG2[:, None] + group_size * spends_C12).flatten(0, 1),
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
        """Yield blocks of leaves from the embeddings [N, D] of the tokens; ids ascend within a block."""
        yield from self._walk(self.root(hidden_ND, attend), 0, attend)

    def _walk(self, block: Prefixes, depth: int, attend: Attend) -> Iterator[Prefixes]:
        if depth == len(self.space.group_layers):
            yield block
            return
        # Big first: such routes are often good, and the low losses that they set spare others the head.
        for part in reversed(block.parts(self.max_rows)):
            yield from self._walk(self.step(part, depth, attend), depth + 1, attend)

    def root(self, hidden_ND: Tensor, attend: Attend, groups: int = 1) -> Prefixes:
        """Return the empty prefix, which has passed the fixed layers before the first choice."""
        ids_1G = torch.zeros(1, groups, dtype=torch.long, device=hidden_ND.device)
        spent_PG2 = torch.tensor(self.space.spent_by_fixed, device=hidden_ND.device).expand(1, groups, 2)
        return self._follow(Prefixes(ids_1G, spent_PG2, hidden_ND[None]), 0, attend)

    def step(self, part: Prefixes, depth: int, attend: Attend) -> Prefixes:
        """Let the group of layers number `depth` choose, drop what reaches no wanted cell, and walk on to the next."""
        layers = self.space.group_layers[depth]
        first = decoder_layers(self.model)[layers[0]]
        children = part.expand(first, self.space.branches, attend, len(layers))
        return self._follow(children.where(self._reaches(children, depth + 1)), depth + 1, attend)

    def _reaches(self, block: Prefixes, depth: int) -> Tensor:
        """Whether each prefix can still end in a wanted cell, bool [P]."""
        sides = self.space.num_layers + 1
        possible = torch.zeros(sides, sides, dtype=torch.bool, device=block.ids_PG.device)
        possible[tuple(zip(*self.space.sums[depth], strict=True))] = True
        left_PQ2 = self.wanted_Q2 - block.spent_PG2[:, :1]
        return ((left_PQ2 >= 0).all(-1) & possible[left_PQ2.clamp(min=0).unbind(-1)]).any(-1)

    def _follow(self, block: Prefixes, depth: int, attend: Attend) -> Prefixes:
        """Walk through the layers in which `depth` choices decide, up to the one that asks for the next."""
        firsts = [-1, *(layers[0] for layers in self.space.group_layers), self.space.num_layers]
        following = decoder_layers(self.model)[firsts[depth] + 1 : firsts[depth + 1]]
        if not following:
            return block
        followed = []
        for part in block.parts(self.max_rows):
            hidden_PND = part.hidden_PND
            for layer in following:
                choice_PG = self._chosen(part.ids_PG, layer.layer_idx, depth)
                choice_PN = choice_PG.repeat_interleave(hidden_PND.shape[1] // choice_PG.shape[1], dim=1)
                hidden_PND = through(layer, hidden_PND, choice_PN, attend)
            followed.append(replace(part, hidden_PND=hidden_PND))
        return join(followed)

    def _chosen(self, ids_PG: Tensor, layer_idx: int, depth: int) -> Tensor:
        """The branches that prefixes of `depth` choices have fixed for a layer, [P, G]."""
        if layer_idx in self.space.fixed:
            return torch.full_like(ids_PG, int(self.space.fixed[layer_idx]))
        group = next(index for index, layers in enumerate(self.space.group_layers) if layer_idx in layers)
        digit_PG = ids_PG // self.space.base ** (depth - 1 - group) % self.space.base
        return torch.tensor(self.space.branches, device=ids_PG.device)[digit_PG]
