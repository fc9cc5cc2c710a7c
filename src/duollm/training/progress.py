"""Progress of a training: a line on the terminal and a JSON object per logged step."""

import json
import sys
import time
from pathlib import Path

from duollm.files import write_text
from duollm.training.optimizer import TrainingPlan

_FORMAT = {"learning_rate": ".1e", "penalty": "g"}


class Progress:
    """Logs every `plan.log_every` steps.

    Args:
        name: name of the training, the first word of each line. tokens_per_step, flops_per_token: to report tokens/s
        and FLOP/s (training: forward and backward). peak: measured matmul peak of this machine, FLOP/s. metrics: JSON
        Lines file to append to. start: number of steps finished earlier. Later records in `metrics` come from a lost
        continuation and are removed.
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
        self.logged, self.since = start, time.perf_counter()
        _drop_records(metrics, name, start)

    def step(self, finished: int, measured: dict[str, float]) -> None:
        """Record that `finished` steps are done, and the values measured in the last one."""
        if finished % self.plan.log_every and finished != self.plan.steps:
            return
        now = time.perf_counter()
        rate = (finished - self.logged) * self.tokens_per_step / (now - self.since)
        left = (self.plan.steps - finished) * self.tokens_per_step / rate
        self.logged, self.since = finished, now
        flops = rate * self.flops_per_token
        record = {"training": self.name, "step": finished, **measured}
        speed = {"tokens_per_second": round(rate, 1), "flops": round(flops), "peak_share": round(flops / self.peak, 4)}
        self.metrics.parent.mkdir(parents=True, exist_ok=True)
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record | speed) + "\n")
        values = "  ".join(f"{key} {value:{_FORMAT.get(key, '.4f')}}" for key, value in measured.items())
        line = (
            f"{self.name}  step {finished}/{self.plan.steps}  {values}  {rate:,.0f} tokens/s  "
            f"{flops / 1e9:,.0f} GFLOP/s ({flops / self.peak:.0%} of matmul peak)  "
            f"ETA {int(left // 60)}:{int(left % 60):02d}"
        )
        if sys.stdout.isatty():  # one line that rewrites itself
            print(f"\r\x1b[K{line}", end="\n" if finished == self.plan.steps else "", flush=True)
        else:
            print(line, flush=True)


def _drop_records(metrics: Path, name: str, start: int) -> None:
    """Remove this training's records after step `start`, so that a continued log has no step twice."""
    if not metrics.exists():
        return
    lines = metrics.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if _is_kept(line, name, start)]
    if len(kept) < len(lines):
        write_text(metrics, "".join(f"{line}\n" for line in kept))


def _is_kept(line: str, name: str, start: int) -> bool:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:  # the process was killed while it wrote this line
        return False
    return bool(record["training"] != name or record["step"] <= start)
