"""The plan of a training: steps, AdamW, its learning-rate schedule, precision."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import nn

from duollm.config import CeilingConfig, PretrainConfig, RouterConfig
from duollm.flops import training_steps
from duollm.machine import Precision, faster_precision


@dataclass(frozen=True)
class TrainingPlan:
    """All numbers of a training loop, independent of the loss.

    Attributes:
        steps: optimiser steps.
        batch_size: sequences per step, over all processes and accumulation parts.
        accumulate: forward and backward passes per step.
        warmup_share: share of the steps in which the learning rate rises linearly. After them it falls along a
            cosine to `final_learning_rate_share` of the peak.
        precision: "bf16" runs the forward under autocast; weights and optimiser stay fp32.
        checkpoint_every, log_every: intervals in steps.
    """

    steps: int
    batch_size: int
    learning_rate: float
    accumulate: int = 1
    warmup_share: float = 0.05
    final_learning_rate_share: float = 0.1
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    gradient_clip: float = 1.0
    precision: Precision = "fp32"
    checkpoint_every: int = 200
    log_every: int = 10

    @classmethod
    def of(
        cls, section: PretrainConfig | RouterConfig | CeilingConfig, tokens: int, sequence_length: int
    ) -> "TrainingPlan":
        """Make a plan from a recipe's section; precision "auto" becomes the faster one on this machine."""
        named = {field.name for field in fields(cls)} & set(type(section).model_fields)
        given: dict[str, Any] = {name: getattr(section, name) for name in named}
        if section.precision == "auto":
            given["precision"] = faster_precision()
        return cls(steps=training_steps(tokens, section.batch_size, sequence_length), **given)

    def decisive(self) -> dict[str, Any]:
        """Return everything that the result depends on: all fields except how often the training logs and saves."""
        return {key: value for key, value in asdict(self).items() if key not in ("checkpoint_every", "log_every")}

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        warmup = max(1, round(self.warmup_share * self.steps))
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.steps - warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        final = self.final_learning_rate_share
        return self.learning_rate * (final + (1 - final) * cosine)


def make_optimizer(module: nn.Module, plan: TrainingPlan) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters. Weight decay applies to matrices only."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [each for each in trainable if each.ndim >= 2], "weight_decay": plan.weight_decay},
        {"params": [each for each in trainable if each.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=plan.learning_rate, betas=plan.betas, fused=True)
