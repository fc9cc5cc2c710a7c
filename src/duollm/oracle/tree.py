"""Walks the tree of routes: every prefix of choices is computed once.

A node at depth d is a prefix of d choices: of the branches of the first d groups of layers. It holds the hidden states
of all tokens under that prefix, before the layer that asks for the next choice. All nodes of one depth are expanded
together if they fit the row budget, so that the matrix products are large. The children of a wider block stay apart by
branch and are walked to the leaves one after another, so that memory stays bounded and nothing is copied.

Which prefixes there are depends on no hidden state. So their numbers and what they choose stay on the CPU, and a GPU is
told what to do without ever being asked.

Shape letters: P prefixes (nodes in a block), N tokens, G groups of them, M of the prefixes, D hidden, C branches,
Q cells.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, cast

import torch
from torch import Tensor

from duollm.config import ModelConfig
from duollm.models.branch import Branch
from duollm.models.configuration_duo import DuoConfig
from duollm.models.dispatch import Dispatch
from duollm.models.modeling_duo import DuoDecoderLayer, DuoForCausalLM, DuoModel
from duollm.oracle.budgets import Cells
from duollm.oracle.contexts import Attend
from duollm.oracle.head import LARGE
from duollm.routes.space import RouteSpace

_LEAVES = 4  # blocks that are entered together, at least


class Rows(NamedTuple):
    """How many hidden vectors a block may hold: on the way through the tree, and of leaves."""

    walked: int
    leaves: int


def rows_of_blocks(model: DuoForCausalLM, space: RouteSpace, memory_bytes: int | None) -> Rows:
    """Return how many hidden vectors a block may hold within the memory budget, and where more do not pay.

    Beyond 2,048 a CPU's products slow down, because what passes between them leaves its caches. A GPU takes its time
    over more than 131,072. Beside a large vocabulary more leaves at a time pay: the best of them spare the others the
    head (docs/LOG.md).
    """
    memory_bytes = default_bytes(model.device) if memory_bytes is None else memory_bytes
    most = 2**17 if model.device.type == "cuda" else 2**11
    walked = max(1, min(memory_bytes // row_bytes(model.config, space), most))
    more = 2**16 if model.config.vocab_size >= LARGE else 0
    left = memory_bytes - walked * _walked_bytes(model.config, space)
    return Rows(walked, max(_LEAVES * walked, min(left // _leaf_bytes(model.config), more)))


def default_bytes(device: torch.device) -> int:
    """Return the memory that a search may take if nobody says: 1 GiB; on a GPU a quarter of what is free."""
    if device.type != "cuda":
        return 2**30
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for whoever asks next
    return (torch.cuda.mem_get_info(device)[0] + kept) // 4


def row_bytes(sizes: DuoConfig | ModelConfig, space: RouteSpace) -> int:
    """Return the memory that the exact search takes for each hidden vector of a block."""
    return _walked_bytes(sizes, space) + _LEAVES * _leaf_bytes(sizes)


def _walked_bytes(sizes: DuoConfig | ModelConfig, space: RouteSpace) -> int:
    """The memory for a hidden vector on the way: blocks wait at every depth, and one is at work."""
    waiting = len(space.group_layers) * (space.base + 1) * sizes.hidden_size
    return 4 * (waiting + 8 * sizes.hidden_size + 3 * sizes.intermediate_size)


def _leaf_bytes(sizes: DuoConfig | ModelConfig) -> int:
    """The memory for a leaf: joined, normalised, taken to the head; the bound's scores and what is kept."""
    return 4 * (5 * sizes.hidden_size + 128)


def decoder_layers(model: DuoModel) -> list[DuoDecoderLayer]:
    """Return the layers, first to last."""
    return cast(list[DuoDecoderLayer], list(model.layers))


def through(
    layer: DuoDecoderLayer, hidden_PND: Tensor, choice_PG: Tensor, attend: Attend, attends_all: bool = False
) -> Tensor:
    """Send hidden states through a layer, each on its given branch, [P, N, D].

    Prefixes that bypass the layer do not attend, unless `attends_all`: a context may keep their keys and values.

    Args:
        choice_PG: the branches of each prefix, for G groups of tokens; on the CPU.
    """
    bypasses = layer.skip_scope == "layer"
    if bypasses and not attends_all and (stays_P := (choice_PG == Branch.SKIP).all(-1)).any():
        if stays_P.all():
            return hidden_PND
        goes_M = _sent((~stays_P).nonzero()[:, 0], hidden_PND)
        return hidden_PND.index_copy(0, goes_M, through(layer, hidden_PND[goes_M], choice_PG[~stays_P], attend))
    attended = layer.attended(hidden_PND, attend(layer, layer.input_layernorm(hidden_PND)))
    counts = choice_PG.flatten().bincount(minlength=len(Branch))
    if counts.count_nonzero() == 1:
        branch = Branch(int(counts.argmax()))
        return hidden_PND if bypasses and branch == Branch.SKIP else layer.branch(branch, *attended, fused=True)
    tokens = hidden_PND.shape[1] // choice_PG.shape[1]
    choice_PN = _sent(choice_PG, hidden_PND).repeat_interleave(tokens, dim=1)
    output_PND = layer.branch(Dispatch.from_choice(choice_PN, (tokens * counts).tolist()), *attended)
    return output_PND.where((choice_PN != Branch.SKIP)[..., None], hidden_PND) if bypasses else output_PND


def follow(
    model: DuoModel, hidden_PND: Tensor, routes_PGL: Tensor, attend: Attend, attends_all: bool = False
) -> Iterator[Tensor]:
    """Send hidden states along given routes (on the CPU); yield them as they enter the first layer and after each."""
    yield hidden_PND
    for layer, choice_PG in zip(decoder_layers(model), routes_PGL.unbind(-1), strict=True):
        hidden_PND = through(layer, hidden_PND, choice_PG, attend, attends_all)
        yield hidden_PND


def _sent(numbers: Tensor, hidden: Tensor) -> Tensor:
    """Numbers of the CPU, sent to where the hidden states are."""
    return numbers.to(hidden.device, non_blocking=True)


@dataclass(frozen=True)
class Prefixes:
    """P prefixes of one depth; G groups of tokens may each have their own. At the last depth they are leaves.

    Attributes:
        ids_PG: numbers in base C, first choice most significant; route ids at the leaves. On the CPU.
        spent_PG2: numbers of small and of big layers in what was chosen so far and in all fixed layers. On the CPU.
        hidden_PND: hidden states after the layers walked so far.
    """

    ids_PG: Tensor
    spent_PG2: Tensor
    hidden_PND: Tensor

    def parts(self, max_rows: int) -> "list[Prefixes]":
        """Split into parts of at most `max_rows` hidden vectors each (at least one prefix)."""
        prefixes = max(1, max_rows // self.hidden_PND.shape[1])
        pieces = (self.ids_PG.split(prefixes), self.spent_PG2.split(prefixes), self.hidden_PND.split(prefixes))
        return [Prefixes(*piece) for piece in zip(*pieces, strict=True)]


def join(blocks: list[Prefixes]) -> Prefixes:
    """Put blocks of one depth together."""
    if len(blocks) == 1:
        return blocks[0]
    fields = zip(*((each.ids_PG, each.spent_PG2, each.hidden_PND) for each in blocks), strict=True)
    return Prefixes(*(torch.cat(each) for each in fields))


@dataclass(frozen=True)
class Tree:
    """The routes that end in one of the wanted cells, over a model's layers.

    Attributes:
        wanted_Q: the wanted cells, bool, on the CPU. Prefixes that reach none of them are cut.
        rows: above `walked` a block is split; blocks of leaves are handed on together up to `leaves`, because each
            costs many small steps, whatever its size.
    """

    model: DuoModel
    cells: Cells
    wanted_Q: Tensor
    rows: Rows

    @property
    def space(self) -> RouteSpace:
        """The routes, wanted and others."""
        return self.cells.space

    def leaves(self, hidden_ND: Tensor, attend: Attend) -> Iterator[Prefixes]:
        """Yield blocks of leaves from the embeddings [N, D] of the tokens."""
        waiting: list[Prefixes] = []
        for block in self._walk(self.root(hidden_ND, attend), 0, attend):
            if waiting and _size([*waiting, block]) > self.rows.leaves:
                joined, waiting = join(waiting), []  # the parts go before the whole is worked on
                yield joined
            waiting.append(block)
        yield join(waiting)

    def _walk(self, block: Prefixes, depth: int, attend: Attend) -> Iterator[Prefixes]:
        if depth == len(self.space.group_layers):
            yield block
            return
        # Big first: such routes are often good, and the low losses that they set spare others the head.
        for part in reversed(block.parts(self.rows.walked)):
            for child in reversed(self.step(part, depth, attend)):
                yield from self._walk(child, depth + 1, attend)

    def root(self, hidden_ND: Tensor, attend: Attend, groups: int = 1) -> Prefixes:
        """Return the empty prefix, which has passed the fixed layers before the first choice."""
        ids_1G = torch.zeros(1, groups, dtype=torch.long)
        spent_PG2 = torch.tensor(self.space.spent_by_fixed).expand(1, groups, 2)
        return self._follow(Prefixes(ids_1G, spent_PG2, hidden_ND[None]), 0, attend)

    def step(self, part: Prefixes, depth: int, attend: Attend) -> list[Prefixes]:
        """Let the group of layers number `depth` choose, and walk on to the next; leave out what is not wanted.

        A block of its own for every branch, or one for all if they fit together. They are joined as late as can be: all
        prefixes of a child take one branch in the other layers of its group too.
        """
        children = [self._follow(child, depth + 1, attend) for child in self._expand(part, depth, attend)]
        return [join(children)] if _size(children) <= self.rows.walked else children

    def _expand(self, part: Prefixes, depth: int, attend: Attend) -> list[Prefixes]:
        """Send prefixes through the layer that asks for choice `depth`; one block of wanted children per branch."""
        layers, base = self.space.group_layers[depth], self.space.base
        layer = decoder_layers(self.model)[layers[0]]
        states_PND = attend(layer, layer.input_layernorm(part.hidden_PND))
        attended_PND, states_PND = layer.attended(part.hidden_PND, states_PND)
        children = []
        for digit, branch in enumerate(self.space.branches):
            spends_2 = torch.tensor([branch == Branch.SMALL, branch == Branch.BIG])
            ids_PG, spent_PG2 = part.ids_PG * base + digit, part.spent_PG2 + len(layers) * spends_2
            bypassed = branch == Branch.SKIP and layer.skip_scope == "layer"
            halfway = [part.hidden_PND] if bypassed else [attended_PND, states_PND]
            wanted_M = self._reaches(depth + 1, spent_PG2).nonzero()[:, 0]
            if not len(wanted_M):
                continue
            if len(wanted_M) < len(ids_PG):
                ids_PG, spent_PG2 = ids_PG[wanted_M], spent_PG2[wanted_M]
                there_M = _sent(wanted_M, part.hidden_PND)
                halfway = [each[there_M] for each in halfway]
            hidden_PND = halfway[0] if bypassed else layer.branch(branch, halfway[0], halfway[1], fused=True)
            children.append(Prefixes(ids_PG, spent_PG2, hidden_PND))
        return children

    def _reaches(self, depth: int, spent_PG2: Tensor) -> Tensor:
        """Whether prefixes of this depth can still end in a wanted cell, bool [P]."""
        possible = self._possible[depth]
        left_PQ2 = self._wanted_Q2 - spent_PG2[:, :1]
        return ((left_PQ2 >= 0).all(-1) & possible[left_PQ2.clamp(min=0).unbind(-1)]).any(-1)

    @cached_property
    def _wanted_Q2(self) -> Tensor:
        """The numbers of small and of big layers of the wanted cells."""
        return torch.tensor(self.cells.spent)[self.wanted_Q]

    @cached_property
    def _possible(self) -> list[Tensor]:
        """For each depth, whether the layers that are left can spend so many small and so many big, bool [L+1, L+1]."""
        sides, found = self.space.num_layers + 1, []
        for sums in self.space.sums:
            found.append(torch.zeros(sides, sides, dtype=torch.bool))
            found[-1][tuple(zip(*sums, strict=True))] = True
        return found

    def _follow(self, block: Prefixes, depth: int, attend: Attend) -> Prefixes:
        """Walk through the layers in which `depth` choices decide, up to the one that asks for the next."""
        firsts = [-1, *self.space.leaders, self.space.num_layers]
        following = decoder_layers(self.model)[firsts[depth] + 1 : firsts[depth + 1]]
        if not following:
            return block
        followed = []
        for part in block.parts(self.rows.walked):
            hidden_PND = part.hidden_PND
            for layer in following:
                hidden_PND = through(layer, hidden_PND, self._chosen(part.ids_PG, layer.layer_idx, depth), attend)
            followed.append(replace(part, hidden_PND=hidden_PND))
        return join(followed)

    def _chosen(self, ids_PG: Tensor, layer_idx: int, depth: int) -> Tensor:
        """The branches that prefixes of `depth` choices have fixed for a layer, [P, G]."""
        if layer_idx in self.space.fixed:
            return torch.full_like(ids_PG, int(self.space.fixed[layer_idx]))
        group = next(index for index, layers in enumerate(self.space.group_layers) if layer_idx in layers)
        digit_PG = ids_PG // self.space.base ** (depth - 1 - group) % self.space.base
        return torch.tensor(self.space.branches)[digit_PG]


def _size(blocks: Sequence[Prefixes]) -> int:
    """The number of hidden vectors."""
    return sum(len(each.hidden_PND) * each.hidden_PND.shape[1] for each in blocks)
