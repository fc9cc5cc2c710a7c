import json

import pytest

from duollm import progress as terminal
from duollm.training.optimizer import TrainingPlan
from duollm.training.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests set by hand."""
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    return now


def test_rates_and_time_left(tmp_path, clock, capsys, monkeypatch):
    monkeypatch.setattr(terminal, "_SECONDS_BETWEEN_LINES", 3.0)
    monkeypatch.setattr(terminal, "_line", terminal._Line(terminal.Console(), rewritten=False))
    plan = TrainingPlan(steps=10, batch_size=2, learning_rate=1.0, log_every=2)
    progress = Progress("tiny", plan, 50, flops_per_token=4.0, peak=1000.0, metrics=tmp_path / "m.jsonl", start=4)
    clock[0] += 1
    progress.step(5, {"loss": 2.0, "learning_rate": 0.1})
    clock[0] += 1
    progress.step(6, {"loss": 2.0, "learning_rate": 0.1})
    assert capsys.readouterr().out == ""
    clock[0] += 1
    progress.step(7, {"loss": 1.5, "learning_rate": 0.1})
    shown = capsys.readouterr().out
    assert shown == "tiny  70%  50 tokens/s  loss 1.500  20% of matmul peak  ETA 0:03\n"
    record = json.loads((tmp_path / "m.jsonl").read_text())
    expected = {"tokens_per_second": 50, "flops": 200, "peak_share": 0.2, "loss": 2.0, "learning_rate": 0.1}
    assert record == {"training": "tiny", "step": 6} | expected


def test_the_last_step_is_always_logged(tmp_path, clock):
    plan = TrainingPlan(steps=3, batch_size=2, learning_rate=1.0, log_every=2)
    progress = Progress("tiny", plan, 50, 4.0, 1000.0, tmp_path / "m.jsonl", start=0)
    for finished in (1, 2, 3):
        clock[0] += 1
        progress.step(finished, {"loss": 2.0, "learning_rate": 0.1})
    assert [json.loads(line)["step"] for line in (tmp_path / "m.jsonl").read_text().splitlines()] == [2, 3]
