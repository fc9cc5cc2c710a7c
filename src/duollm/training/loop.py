"""The training loop, one for every stage: what differs is the loss function."""

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from duollm.errors import UserError
from duollm.files import fingerprint
from duollm.machine import matmul_peak
from duollm.training.checkpoint import Stateful, load_checkpoint, save_checkpoint
from duollm.training.optimizer import TrainingPlan, make_optimizer
from duollm.training.progress import Progress
from duollm.training.world import World

LossFn = Callable[[Tensor, int, int], tuple[Tensor, dict[str, float]]]
"""(token ids [B, T], step, part of the step) -> (loss to minimise, what else to log). What it draws
must depend on its arguments alone, so that a resumed training repeats an uninterrupted one."""


Batches = Callable[[int], NDArray[np.int64]]
"""step -> the global batch, token ids [B, T]; must depend on the step alone."""


class NonFiniteLossError(UserError):
    """The loss or its gradient is not a number any more; the weights are those of the step before."""


def train(
    name: str,
    module: nn.Module,
    loss_fn: LossFn,
    batch_at: Batches,
    plan: TrainingPlan,
    world: World,
    run: Path,
    flops_per_token: float,
) -> None:
    """Train the trainable parameters of `module` for `plan.steps` steps, continuing a checkpoint if there is one.

    Args:
        name: names the checkpoint `run/resume/<name>.pt` and the records in `run/metrics.jsonl`.
        module: holds the parameters; it is the loss function that runs it.
        flops_per_token: of forward and backward, for the progress line.

    Raises:
        UserError: the batch cannot be shared evenly, or the checkpoint is not of this training.
        NonFiniteLossError: before the optimiser would have spoiled the weights.
        KeyboardInterrupt: on Ctrl-C or SIGTERM, after the current step and a checkpoint.
    """
    optimizer = make_optimizer(module, plan)
    trainable = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def take_step(batch_BT: Tensor, step: int) -> dict[str, float]:
        learning_rate = plan.learning_rate_at(step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        measured = _accumulate_gradients(loss_fn, batch_BT, step, plan, world)
        world.average_gradients(trainable)
        norm = nn.utils.clip_grad_norm_(trainable, plan.gradient_clip).item()
        if not (math.isfinite(measured["loss"]) and math.isfinite(norm)):
            checkpoint = _checkpoint(run, name)
            raise NonFiniteLossError(_non_finite(name, step, measured["loss"], norm, checkpoint))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return measured | {"gradient_norm": norm, "learning_rate": learning_rate}

    run_steps(name, module, optimizer, take_step, batch_at, plan, world, run, flops_per_token)


def run_steps(
    name: str,
    module: nn.Module,
    state: Stateful,
    take_step: Callable[[Tensor, int], dict[str, float]],
    batch_at: Batches,
    plan: TrainingPlan,
    world: World,
    run: Path,
    flops_per_token: float,
) -> None:
    """Take the steps of a plan, with progress and checkpoints; what a step does is the caller's.

    Args:
        state: what a step changes beside the trainable parameters of `module`.
        take_step: (this process's share of the batch [B, T], step) -> what to log.
        name, batch_at, flops_per_token, raises: as in `train`.
    """
    _check_shares(plan, world)
    checkpoint, identity = _checkpoint(run, name), fingerprint([name, plan.decisive(), world.size])
    start = load_checkpoint(checkpoint, module, state, identity)
    progress = None
    if world.first:
        peak = matmul_peak(plan.precision) * world.size
        progress = Progress(name, plan, batch_at(0).size, flops_per_token, peak, run / "metrics.jsonl", start)
    with _stop_requests() as stop:
        for step in range(start, plan.steps):
            measured = take_step(world.share(torch.from_numpy(batch_at(step))), step)
            finished, stopped = step + 1, world.any(stop())
            if progress:
                progress.step(finished, measured)
                if stopped or (finished % plan.checkpoint_every == 0 and finished < plan.steps):
                    save_checkpoint(checkpoint, module, state, finished, identity)
            if stopped:
                raise KeyboardInterrupt(f"stopped after step {finished}; run the same command to continue")


def _checkpoint(run: Path, name: str) -> Path:
    return run / "resume" / f"{name}.pt"


def _check_shares(plan: TrainingPlan, world: World) -> None:
    """Uneven shares would give sequences uneven weights."""
    if plan.batch_size % (world.size * plan.accumulate):
        raise UserError(
            f"batch_size ({plan.batch_size}) must be a multiple of processes x accumulate "
            f"({world.size} x {plan.accumulate})"
        )


def _accumulate_gradients(
    loss_fn: LossFn, batch_BT: Tensor, step: int, plan: TrainingPlan, world: World
) -> dict[str, float]:
    """Add up the gradients of the step's parts; return the mean of what was measured."""
    totals: dict[str, float] = {}
    for part, part_BT in enumerate(batch_BT.chunk(plan.accumulate)):
        with torch.autocast(world.device.type, torch.bfloat16, enabled=plan.precision == "bf16"):
            loss, details = loss_fn(part_BT, step, part)
        (loss / plan.accumulate).backward()
        for key, value in ({"loss": world.average(loss)} | details).items():
            totals[key] = totals.get(key, 0.0) + value / plan.accumulate
    return totals


def _non_finite(name: str, step: int, loss: float, norm: float, checkpoint: Path) -> str:
    good = f"the last good checkpoint is {checkpoint}" if checkpoint.exists() else "there is no checkpoint yet"
    return (
        f"{name}: loss {loss} with gradient norm {norm} at step {step + 1}; the step was not taken; {good}. "
        "Lower the learning rate, or use precision fp32."
    )


@contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Turn Ctrl-C and SIGTERM into a flag that is read between steps; a second Ctrl-C acts at once."""
    asked = False

    def ask(signum: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
