"""The training loop of all stages, its log and its checkpoints. Stages differ in the loss function.

Shape letters: B batch, T tokens.
"""

import json
import math
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from duollm.data.packed import PackedData
from duollm.errors import UserError
from duollm.files import fingerprint, replacing, write_text
from duollm.machine import autocast, matmul_peak
from duollm.terminal import show
from duollm.training.optimizer import TrainingPlan, make_optimizer
from duollm.training.world import World

if TYPE_CHECKING:
    from torch.distributed.checkpoint.stateful import Stateful

LossFn = Callable[[Tensor, int, int], tuple[Tensor, dict[str, float]]]
"""(token ids [B, T], step, part of the step) -> (loss to minimise, what else to log). Random numbers in
it must depend on its arguments alone, so that a resumed training repeats an uninterrupted one."""


_SHOWN = ("loss", "nll", "explained")
"""What of a step is shown; the records hold everything."""


class NonFiniteLossError(UserError):
    """The loss or its gradient is no longer finite. The weights are those of the step before."""


@dataclass(frozen=True)
class Context:
    """Shared by all trainings of a study: the run folder, text, seed and processes."""

    run: Path
    data: PackedData
    seed: int
    world: World


@dataclass(frozen=True)
class Trainer:
    """One training: its name, plan and data, its processes, and the run folder it writes to.

    Attributes:
        name: name of the checkpoint `run/resume/<name>.pt` and of the records in `run/metrics.jsonl`.
        batch_at: step -> the global batch, token ids [B, T]. It must depend on the step alone.
        flops_per_token: FLOPs of forward and backward, for the progress line.
    """

    name: str
    plan: TrainingPlan
    batch_at: Callable[[int], NDArray[np.int64]]
    world: World
    run: Path
    flops_per_token: float

    @classmethod
    def of(cls, name: str, plan: TrainingPlan, context: Context, seed: int, flops_per_token: float) -> "Trainer":
        """Make a trainer on the study's training split, in an order that `seed` decides."""
        batch_at = partial(context.data.train_batch, batch_size=plan.batch_size, seed=seed)
        return cls(name, plan, batch_at, context.world, context.run, flops_per_token)

    def train(self, module: nn.Module, loss_fn: LossFn) -> None:
        """Minimise `loss_fn` by AdamW over the trainable parameters of `module`; the loss function runs the module.

        Raises:
            NonFiniteLossError: loss or gradient is not finite. The step is not taken, so the weights are intact.
            UserError, KeyboardInterrupt: as `take_steps` does.
        """
        optimizer = make_optimizer(module, self.plan)
        trainable = [parameter for group in optimizer.param_groups for parameter in group["params"]]

        def take_step(batch_BT: Tensor, step: int) -> dict[str, float]:
            learning_rate = self.plan.learning_rate_at(step)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            measured = self._accumulate_gradients(loss_fn, batch_BT, step)
            self.world.average_gradients(trainable)
            norm = nn.utils.clip_grad_norm_(trainable, self.plan.gradient_clip).item()
            if not (math.isfinite(measured["loss"]) and math.isfinite(norm)):
                known = self.checkpoint.exists()
                good = f"the last good checkpoint is {self.checkpoint}" if known else "there is no checkpoint yet"
                raise NonFiniteLossError(
                    f"{self.name}: loss {measured['loss']} with gradient norm {norm} at step {step + 1}; the step was "
                    f"not taken; {good}. Lower the learning rate, or use precision fp32."
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return measured | {"gradient_norm": norm, "learning_rate": learning_rate}

        self.take_steps(module, optimizer, take_step)

    def take_steps(
        self, module: nn.Module, state: "Stateful", take_step: Callable[[Tensor, int], dict[str, float]]
    ) -> None:
        """Take the steps of the plan, with progress and checkpoints. Continue from a checkpoint if there is one.

        Args:
            state: the state that a step changes beside the trainable parameters of `module`, such as an optimiser.
            take_step: (this process's share of the batch [B, T], step) -> values to log.

        Raises:
            UserError: the processes cannot share the batch evenly, or the checkpoint is of another training.
            KeyboardInterrupt: on Ctrl-C or SIGTERM, after the current step and a checkpoint.
        """
        plan, world = self.plan, self.world
        if plan.batch_size % (world.size * plan.accumulate):  # uneven shares would give sequences uneven weights
            raise UserError(
                f"batch_size ({plan.batch_size}) must be a multiple of processes x accumulate "
                f"({world.size} x {plan.accumulate})"
            )
        identity = fingerprint([self.name, plan.decisive(), world.size])
        start = load_checkpoint(self.checkpoint, module, state, identity)
        progress = None
        if world.first:
            peak, metrics = matmul_peak(plan.precision) * world.size, self.run / "metrics.jsonl"
            progress = Progress(self.name, plan, self.batch_at(0).size, self.flops_per_token, peak, metrics, start)
        with _stop_requests() as stop:
            for step in range(start, plan.steps):
                measured = take_step(world.share(torch.from_numpy(self.batch_at(step))), step)
                finished, stopped = step + 1, world.any(stop())
                if progress:
                    progress.step(finished, measured)
                    if stopped or (finished % plan.checkpoint_every == 0 and finished < plan.steps):
                        save_checkpoint(self.checkpoint, module, state, finished, identity)
                if stopped:
                    raise KeyboardInterrupt(f"stopped after step {finished}; run the same command to continue")

    @property
    def checkpoint(self) -> Path:
        """The file from which an interrupted training continues."""
        return self.run / "resume" / f"{self.name}.pt"

    def autocast(self) -> torch.autocast:
        """Return the context manager for a forward in the plan's precision."""
        return autocast(self.world.device, self.plan.precision)

    def _accumulate_gradients(self, loss_fn: LossFn, batch_BT: Tensor, step: int) -> dict[str, float]:
        """Add up the gradients of the step's parts; return the mean of what was measured."""
        totals: dict[str, float] = {}
        parts = self.plan.accumulate
        for part, part_BT in enumerate(batch_BT.chunk(parts)):
            with self.autocast():
                loss, details = loss_fn(part_BT, step, part)
            (loss / parts).backward()
            for key, value in ({"loss": self.world.average(loss)} | details).items():
                totals[key] = totals.get(key, 0.0) + value / parts
        return totals


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


class Progress:
    """Shows every step, and logs every `plan.log_every` steps.

    Args:
        name: name of the training, the first word of its line.
        tokens_per_step, flops_per_token: to report tokens/s and FLOP/s (training: forward and backward).
        peak: measured matmul peak of this machine, FLOP/s.
        metrics: JSON Lines file to append to.
        start: number of steps finished earlier. Later records in `metrics` are of a lost continuation and go.
    """

    def __init__(
        self,
        name: str,
        plan: TrainingPlan,
        tokens_per_step: int,
        flops_per_token: float,
        peak: float,
        metrics: Path,
        start: int,
    ) -> None:
        self.name, self.plan, self.metrics = name, plan, metrics
        self.tokens_per_step, self.flops_per_token, self.peak = tokens_per_step, flops_per_token, peak
        self.logged, self.since, self.peak_share = start, time.perf_counter(), ""
        _drop_records(metrics, name, start)
        show(name, start * tokens_per_step, plan.steps * tokens_per_step)

    def step(self, finished: int, measured: dict[str, float]) -> None:
        """Record that `finished` steps are done, and the values measured in the last one."""
        values = "  ".join(f"{key} {measured[key]:.3f}" for key in _SHOWN if key in measured)
        done, total = (steps * self.tokens_per_step for steps in (finished, self.plan.steps))
        if finished % self.plan.log_every == 0 or finished == self.plan.steps:
            self._log(finished, measured)
        show(self.name, done, total, note="  ".join(filter(None, (values, self.peak_share))))

    def _log(self, finished: int, measured: dict[str, float]) -> None:
        now = time.perf_counter()
        rate = (finished - self.logged) * self.tokens_per_step / (now - self.since)
        self.logged, self.since = finished, now
        flops = rate * self.flops_per_token
        record = {"training": self.name, "step": finished, **measured}
        speed = {"tokens_per_second": round(rate, 1), "flops": round(flops), "peak_share": round(flops / self.peak, 4)}
        self.metrics.parent.mkdir(parents=True, exist_ok=True)
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record | speed) + "\n")
        self.peak_share = f"{flops / self.peak:.0%} of matmul peak"


def _drop_records(metrics: Path, name: str, start: int) -> None:
    """Remove this training's records after step `start`, so that a continued log has no step twice."""
    if not metrics.exists():
        return
    kept = []
    for line in metrics.read_text(encoding="utf-8").splitlines():
        with suppress(json.JSONDecodeError):  # the process was killed while it wrote this line
            record = json.loads(line)
            if record["training"] != name or record["step"] <= start:
                kept.append(f"{line}\n")
    write_text(metrics, "".join(kept))


def save_checkpoint(path: Path, module: nn.Module, optimizer: "Stateful", step: int, identity: str) -> None:
    """Write everything that the loop needs to continue after `step` finished steps."""
    state = {
        "identity": identity,
        "step": step,
        "trained": {name: each for name, each in module.named_parameters() if each.requires_grad},
        "optimizer": optimizer.state_dict(),
    }
    with replacing(path) as temporary:
        torch.save(state, temporary)


def load_checkpoint(path: Path, module: nn.Module, optimizer: "Stateful", identity: str) -> int:
    """Restore a checkpoint, if there is one, without executing any of its content; return the number of finished steps.

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
