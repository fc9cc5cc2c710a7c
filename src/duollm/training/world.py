"""One process or many: rank, device and averaged gradients (torchrun sets the environment)."""

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from duollm.errors import UserError, in_a_line

_TOGETHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """This process and the others that work together with it."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def share(self, batch: Tensor) -> Tensor:
        """Return this process's rows of a global batch [B, ...], on its device."""
        return batch[self.rank :: self.size].to(self.device)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its mean over all processes."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self.size == 1 or not gradients:
            return
        flat = _flatten_dense_tensors(gradients)
        distributed.all_reduce(flat)
        flat /= self.size
        for gradient, mean in zip(gradients, _unflatten_dense_tensors(flat, gradients), strict=True):
            gradient.copy_(mean)

    def add_up(self, values: Tensor) -> Tensor:
        """Replace a tensor by the sum over all processes, in place, and return it."""
        if self.size > 1:
            distributed.all_reduce(values)
        return values

    def average(self, value: Tensor) -> float:
        """Return the mean of a scalar over all processes."""
        return self.add_up(value.detach().clone()).item() / self.size

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in any process, so that all processes act alike."""
        return self.average(torch.tensor(float(flag), device=self.device)) > 0

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            distributed.barrier()


def join_world() -> World:
    """Join the processes that torchrun started; a world of one without torchrun.

    Raises:
        UserError: the environment has only some of the variables that torchrun sets, or impossible values.
    """
    on_gpu = torch.cuda.is_available()
    together = _check_environment(torch.cuda.device_count() if on_gpu else None)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)  # what names no GPU means this one: timing, free memory, NCCL's barrier
    if not together:
        return World(0, 1, device)
    if not distributed.is_initialized():
        try:
            distributed.init_process_group("nccl" if on_gpu else "gloo")
        except (ValueError, TypeError, RuntimeError) as error:  # a port that is taken, or that does not exist
            place = f"{os.environ['MASTER_ADDR']}, port {os.environ['MASTER_PORT']}"
            raise UserError(
                f"the processes cannot meet at {place}, as the environment says: {in_a_line(error)}; "
                "start them with torchrun, and another port"
            ) from None
    return World(distributed.get_rank(), distributed.get_world_size(), device)


def _check_environment(gpus: int | None) -> bool:
    """Whether this is one of several processes; what torchrun sets must then be there, whole and possible."""
    numbers = {name: _number(name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK")}
    if gpus is not None and (numbers["LOCAL_RANK"] or 0) >= gpus:
        raise UserError(f"LOCAL_RANK is {numbers['LOCAL_RANK']}, but there are {gpus} GPUs; start fewer processes")
    if numbers["WORLD_SIZE"] is None and numbers["RANK"] is None:
        return False
    missing = [name for name in _TOGETHER if not os.environ.get(name)]
    if missing:
        given = next(name for name in ("WORLD_SIZE", "RANK") if name in os.environ)
        raise UserError(
            f"the environment sets {given} but not {', '.join(missing)}; start several processes with torchrun, "
            "or one alone with `env -u WORLD_SIZE -u RANK`"
        )
    rank, size = numbers["RANK"] or 0, numbers["WORLD_SIZE"] or 0
    if rank >= size:
        raise UserError(f"RANK is {rank} and WORLD_SIZE {size}; RANK must be below WORLD_SIZE")
    return True


def _number(name: str) -> int | None:
    """A whole number of the environment; None: it is not set."""
    text = os.environ.get(name)
    if text is not None and not text.isdecimal():
        raise UserError(f"the environment sets {name} to {text!r}; torchrun sets it to a whole number")
    return None if text is None else int(text)
