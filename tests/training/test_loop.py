import json
import os
import signal

import pytest
import torch

from duollm import terminal
from duollm.errors import UserError
from duollm.training.loop import NonFiniteLossError, Progress, load_checkpoint, save_checkpoint
from duollm.training.optimizer import TrainingPlan, make_optimizer
from duollm.training.pretrain import random_routing_loss
from duollm.training.world import World
from tiny import tiny_model
from tiny_training import batch_at, fixed_route_loss

GOLDEN_LOSSES = [4.1525, 3.9384, 4.1811, 4.0819, 4.4842, 3.8125, 4.0839, 4.1219, 3.8353, 3.7336]
GOLDEN_LOSSES += [3.7727, 4.1233, 3.9155, 3.9749, 4.0365, 3.9984, 3.4608, 3.8095, 3.4063, 3.7585]
"""Losses of 20 steps of `tiny_model()` with random routing, fp32. A change of a digit is a change of the training."""


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def dies_at(step):
    """Batches of a machine that fails."""

    def batches(asked):
        if asked == step:
            raise OSError("power cut")
        return batch_at(asked)

    return batches


def test_twenty_steps_have_the_golden_losses(training, model):
    loss_fn = random_routing_loss(model, (0.2, 0.4, 0.4), seed=5, world=training.world)
    training(model, loss_fn, steps=20)
    assert [record["loss"] for record in records(training.run)] == pytest.approx(GOLDEN_LOSSES, abs=2e-3)


@pytest.mark.parametrize("died_in", [1, 3, 5])
def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(tmp_path, training, model, died_in):
    def routed(trained):
        return random_routing_loss(trained, (0.2, 0.4, 0.4), seed=5, world=training.world)

    whole = weights(training(model, routed(model)))
    uninterrupted = records(training.run)
    training.run = tmp_path / "resumed"
    victim = tiny_model().train()
    with pytest.raises(OSError, match="power cut"):
        training(victim, routed(victim), batches=dies_at(died_in))
    heir = tiny_model(seed=9).train() if died_in > 2 else tiny_model().train()  # a checkpoint holds all that is trained
    assert_same(weights(training(heir, routed(heir))), whole)
    resumed = records(training.run)
    assert [record["step"] for record in resumed] == [1, 2, 3, 4, 5, 6]
    for ours, theirs in zip(resumed, uninterrupted, strict=True):
        assert all(ours[key] == theirs[key] for key in ("loss", "gradient_norm", "learning_rate"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step_with_a_checkpoint(tmp_path, training, model, number):
    whole = weights(training(model))
    training.run = tmp_path / "stopped"

    def signalled(step):
        if step == 2:
            os.kill(os.getpid(), number)
        return batch_at(step)

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 3"):
        training(tiny_model().train(), batches=signalled, checkpoint_every=100)
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    assert [record["step"] for record in records(training.run)] == [1, 2, 3]
    assert_same(weights(training(tiny_model(seed=9).train())), whole)


def test_a_line_cut_off_by_a_kill_is_dropped(training, model):
    with pytest.raises(OSError, match="power cut"):
        training(model, batches=dies_at(3))
    with (training.run / "metrics.jsonl").open("a") as file:
        file.write('{"training": "ti')
    training(model)
    assert [record["step"] for record in records(training.run)] == [1, 2, 3, 4, 5, 6]


def test_records_of_other_trainings_stay(training, model):
    training(model, name="first", steps=2)
    training(tiny_model().train(), name="second", steps=1)
    training(tiny_model().train(), name="first", steps=1)
    assert [(record["training"], record["step"]) for record in records(training.run)] == [("second", 1), ("first", 1)]


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_parts_are_the_whole_batch(tmp_path, training, model, accumulate):
    whole, measured = weights(training(model)), records(training.run)
    training.run = tmp_path / "in parts"
    in_parts = weights(training(tiny_model().train(), accumulate=accumulate))
    for name, value in whole.items():
        torch.testing.assert_close(in_parts[name], value, atol=1e-4, rtol=1e-3)
    for ours, theirs in zip(records(training.run), measured, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
        assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-3)  # AdamW would hide its scale


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_non_finite_loss_stops_before_it_spoils_the_weights(tmp_path, training, model, poison):
    fixed = fixed_route_loss(model)

    def poisoned(batch_BT, step, part):
        loss, details = fixed(batch_BT, step, part)
        if step == 3:
            return (loss * torch.nan if poison == "loss" else loss + (loss - loss.detach()).sqrt()), details
        return loss, details

    expected = weights(training(tiny_model().train(), steps=6, batches=batch_at))
    training.run = tmp_path / "poisoned"
    before = tiny_model().train()
    with pytest.raises(OSError, match="power cut"):
        training(before, batches=dies_at(3))
    with pytest.raises(NonFiniteLossError, match=r"at step 4; .*resume/tiny\.pt"):
        training(model, poisoned)
    assert_same(weights(model), weights(before))
    assert_same(weights(training(tiny_model(seed=9).train())), expected)


def test_without_a_checkpoint_the_message_says_so(training, model):
    with pytest.raises(NonFiniteLossError, match=r"step 1; .*no checkpoint yet.*Lower the learning rate"):
        training(model, lambda batch, step, part: (model.lm_head.weight.sum() * torch.inf, {}))


def test_frozen_parameters_stay(training, model):
    model.model.layers.requires_grad_(False)
    before = weights(model)
    after = weights(training(model))
    assert not torch.equal(after["lm_head.weight"], before["lm_head.weight"])
    layers = [name for name in before if ".layers." in name]
    assert_same({name: after[name] for name in layers}, {name: before[name] for name in layers})


@pytest.mark.parametrize(("batch_size", "accumulate", "processes"), [(4, 3, 1), (4, 1, 3), (4, 2, 4)])
def test_a_batch_that_cannot_be_shared_evenly_is_refused(training, model, batch_size, accumulate, processes):
    training.world = World(0, processes, torch.device("cpu"))
    with pytest.raises(UserError, match=rf"batch_size \(4\) .* \({processes} x {accumulate}\)"):
        training(model, batch_size=batch_size, accumulate=accumulate)


def test_what_the_loss_measured_is_logged(training, model):
    fixed = fixed_route_loss(model)

    def measured(batch_BT, step, part):
        return fixed(batch_BT, step, part)[0], {"share": float(part)}

    training(model, measured, steps=3, accumulate=2, log_every=2)
    logged = records(training.run)
    assert [record["step"] for record in logged] == [2, 3]
    assert all(record["share"] == 0.5 for record in logged)
    assert {"training", "loss", "learning_rate", "tokens_per_second", "gradient_norm"} <= logged[0].keys()


@pytest.fixture
def saved(tmp_path, model):
    path = tmp_path / "resume" / "tiny.pt"
    save_checkpoint(path, model, make_optimizer(model, TrainingPlan(1, 1, 1.0)), 7, "mine")
    return path


def load(path, identity="mine"):
    model = tiny_model(seed=5)
    return load_checkpoint(path, model, make_optimizer(model, TrainingPlan(1, 1, 1.0)), identity), model


def test_no_checkpoint_means_from_the_start(tmp_path):
    assert load(tmp_path / "none.pt")[0] == 0


def test_a_checkpoint_restores_step_and_weights(saved, model):
    step, restored = load(saved)
    assert step == 7
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in restored.state_dict().items())


def test_a_checkpoint_of_another_training_is_refused(saved):
    with pytest.raises(UserError, match=r"tiny\.pt: belongs to a training with other settings; delete it"):
        load(saved, identity="other")


@pytest.mark.parametrize("length", [0, 10, 1000, -100])
def test_a_truncated_checkpoint_is_refused(saved, length):
    saved.write_bytes(saved.read_bytes()[:length])
    with pytest.raises(UserError, match=r"tiny\.pt: damaged checkpoint .*delete it"):
        load(saved)


@pytest.mark.parametrize("content", [{"step": 1}, [1, 2], {"step": 1, "identity": "mine", "trained": {}}])
def test_a_file_of_something_else_is_refused(saved, content):
    torch.save(content, saved)
    with pytest.raises(UserError, match="damaged checkpoint"):
        load(saved)


def test_a_checkpoint_that_would_run_code_is_refused(saved):
    torch.save({"step": print, "identity": "mine", "trained": {}, "optimizer": {}}, saved)
    with pytest.raises(UserError, match="damaged checkpoint"):
        load(saved)


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
