"""How much of a search is held at a time, so that blocks are wide and memory stays bounded."""

from typing import NamedTuple

import torch

from duollm.config import ModelConfig
from duollm.models.configuration_duo import DuoConfig
from duollm.models.modeling_duo import DuoForCausalLM
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
