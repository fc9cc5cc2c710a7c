"""A tiny training: batches of random tokens, a loss with a fixed route, a world of one."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from duollm.config import RouterConfig
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.oracle.labels import Labels
from duollm.routers.base import RouterTraining
from duollm.routers.registry import make_router
from duollm.routers.sequential import RidgeSums, SequentialRouter
from duollm.training.loop import LossFn, Trainer
from duollm.training.optimizer import TrainingPlan
from duollm.training.world import World
from tiny import random_ids, tiny_model

ALONE = World(0, 1, torch.device("cpu"))


def batch_at(step: int) -> np.ndarray:
    """Batches of four that depend on the step alone."""
    return random_ids(batch=4, tokens=8, seed=100 + step).numpy()


def router_training(
    model: DuoForCausalLM,
    config: RouterConfig | None = None,
    budget: float | None = None,
    steps: int = 6,
    seed: int = 0,
    labels: Labels | None = None,
    run: Path = Path(),
) -> RouterTraining:
    """What a router's training is given."""
    plan = TrainingPlan(steps=steps, batch_size=4, learning_rate=1e-2)
    return RouterTraining(
        model, config or RouterConfig(), Trainer("tiny", plan, batch_at, ALONE, run, 1.0), budget, seed, labels
    )


def fixed_route_loss(model: DuoForCausalLM) -> LossFn:
    """The mean nll with every token on the same branches."""

    def loss_fn(batch_BT, step, part):
        return model(input_ids=batch_BT, labels=batch_BT, routes=[2, 1, 2], use_cache=False).loss, {}

    return loss_fn


def regression_rows() -> tuple[SequentialRouter, RidgeSums, torch.Tensor, torch.Tensor]:
    """A router of three layers, its empty sums, and random inputs [L, N, F] and targets [L, N, C] for them."""
    router = make_router("sequential", tiny_model().config, ["small", "big"])
    generator = torch.Generator().manual_seed(0)
    layers, choices, inputs = router.weight_LCD.shape
    input_LNF = torch.randn(layers, 400, inputs, generator=generator)
    true_LFC = torch.randn(layers, inputs, choices, generator=generator)
    noise_LNC = torch.randn(layers, 400, choices, generator=generator)
    return router, RidgeSums(router), input_LNF, input_LNF @ true_LFC + noise_LNC + 0.7


@dataclass
class Training:
    """A training that a test may vary, repeat and interrupt."""

    run: Path
    world: World = ALONE

    def __call__(self, model, loss_fn=None, batches=batch_at, name="tiny", **plan):
        defaults = {"steps": 6, "batch_size": 4, "learning_rate": 1e-2, "checkpoint_every": 2, "log_every": 1}
        loss_fn = loss_fn or fixed_route_loss(model)
        plan = TrainingPlan(**(defaults | plan))
        Trainer(name, plan, batches, self.world, self.run, flops_per_token=1.0).train(model, loss_fn)
        return model
