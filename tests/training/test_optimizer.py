import pytest
import torch

from duollm.config import CeilingConfig, PretrainConfig, RouterConfig
from duollm.training.optimizer import TrainingPlan, make_optimizer
from tiny import tiny_model


def rates(**plan):
    plan = TrainingPlan(batch_size=1, **plan)
    return [plan.learning_rate_at(step) for step in range(plan.steps)]


def test_the_schedule_rises_linearly_and_falls_as_a_cosine():
    # warm-up over 2 of 6 steps; then cos(0), cos(pi / 4), cos(pi / 2), cos(3 pi / 4) between 1 and the final 0.2
    got = rates(steps=6, learning_rate=10.0, warmup_share=1 / 3, final_learning_rate_share=0.2)
    half = 0.5**0.5
    expected = [5, 10, 10, 2 + 8 * (1 + half) / 2, 6, 2 + 8 * (1 - half) / 2]
    assert got == pytest.approx(expected)


def test_the_first_step_is_never_wasted():
    assert rates(steps=1, learning_rate=3.0) == [3.0]
    assert rates(steps=3, learning_rate=3.0, warmup_share=0.0)[0] == 3.0


def test_only_matrices_decay_and_frozen_parameters_are_left_out():
    model = tiny_model(attention_bias=True)
    model.model.embed_tokens.requires_grad_(False)
    decayed, plain = make_optimizer(model, TrainingPlan(1, 1, 1.0, weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    names = {id(each): name for name, each in model.named_parameters()}
    assert {names[id(each)].rpartition(".")[2] for each in decayed["params"]} == {"weight"}
    assert all("norm" in names[id(each)] or names[id(each)].endswith("bias") for each in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(names) - 1


def test_only_what_changes_the_result_is_decisive():
    plan = {"steps": 4, "batch_size": 2, "learning_rate": 1.0}
    assert TrainingPlan(**plan, log_every=1, checkpoint_every=1).decisive() == TrainingPlan(**plan).decisive()
    assert TrainingPlan(**plan, weight_decay=0.5).decisive() != TrainingPlan(**plan).decisive()


def test_auto_takes_the_faster_precision(monkeypatch):
    monkeypatch.setattr("duollm.training.optimizer.faster_precision", lambda: "bf16")
    for wanted, taken in (("auto", "bf16"), ("fp32", "fp32"), ("bf16", "bf16")):
        assert TrainingPlan.of(RouterConfig(precision=wanted), 100, 16).precision == taken


def test_a_section_of_a_recipe_becomes_a_plan():
    config = PretrainConfig(
        batch_size=4,
        accumulate=2,
        learning_rate=0.5,
        final_learning_rate_share=0.3,
        gradient_clip=2.0,
        precision="fp32",
    )
    plan = TrainingPlan.of(config, tokens=1000, sequence_length=16)
    assert (plan.steps, plan.accumulate, plan.learning_rate, plan.gradient_clip) == (16, 2, 0.5, 2.0)
    assert (plan.final_learning_rate_share, plan.warmup_share, plan.weight_decay) == (0.3, 0.05, 0.1)
    assert TrainingPlan.of(CeilingConfig(precision="fp32"), 1000, 16).weight_decay == 0.1


def test_one_step_is_that_of_adamw():
    """Decoupled decay, then a step of the learning rate against the sign (bias-corrected first step)."""
    layer = torch.nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -2.0]]))
    optimizer = make_optimizer(layer, TrainingPlan(1, 1, 0.1, weight_decay=0.5))
    layer.weight.grad = torch.tensor([[3.0, -4.0]])
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), torch.tensor([[1 * 0.95 - 0.1, -2 * 0.95 + 0.1]]))
