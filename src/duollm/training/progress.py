"""Progress of a training: its line of the study, and a JSON object per logged step."""

import json
import time
from contextlib import suppress
from pathlib import Path

from duollm.files import write_text
from duollm.progress import show
from duollm.training.optimizer import TrainingPlan

_SHOWN = ("loss", "nll", "explained")
"""What of a step is shown; the records hold everything."""


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
