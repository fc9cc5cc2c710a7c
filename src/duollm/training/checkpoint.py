"""Checkpoints of an unfinished training. Reading one executes none of its content."""

import pickle
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from duollm.errors import UserError
from duollm.files import replacing


class Stateful(Protocol):
    """An optimiser, or another state that a training carries from step to step."""

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next step depends on."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


def save_checkpoint(path: Path, module: nn.Module, optimizer: Stateful, step: int, identity: str) -> None:
    """Write everything that the loop needs to continue after `step` finished steps."""
    state = {
        "identity": identity,
        "step": step,
        "trained": {name: each for name, each in module.named_parameters() if each.requires_grad},
        "optimizer": optimizer.state_dict(),
    }
    with replacing(path) as temporary:
        torch.save(state, temporary)


def load_checkpoint(path: Path, module: nn.Module, optimizer: Stateful, identity: str) -> int:
    """Restore a checkpoint, if there is one; return the number of finished steps.

    Raises:
        UserError: the file is damaged, or belongs to another training.
    """
    if not path.exists():
        return 0
    state = _read(path)
    if state["identity"] != identity:
        raise UserError(f"{path}: belongs to a training with other settings; delete it to start anew")
    trained = dict(module.named_parameters())
    with torch.no_grad():
        for name, value in state["trained"].items():
            trained[name].copy_(value)
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def _read(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        missing = {"identity", "step", "trained", "optimizer"} - set(state)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError):
        missing = {"a readable content"}
    if missing:
        raise UserError(f"{path}: damaged checkpoint (lacks {', '.join(sorted(missing))}); delete it to start anew")
    return state
