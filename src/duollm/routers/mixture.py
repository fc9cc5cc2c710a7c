"""The paper's objective: the language-model loss of the softly mixed model, and the budget (paper, section 5).

Shape letters: B batch, T tokens, C branches of the router.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from duollm.models.branch import Branch
from duollm.routers.base import Router
from duollm.routers.lesson import Lesson
from duollm.routes.sampling import derived_seed
from duollm.training.loop import LossFn


def mixture_loss(lesson: Lesson) -> LossFn:
    """CE + alpha * budget loss of the softly mixed model; the temperature falls geometrically (paper, section 5)."""
    model, router, config, budget = lesson.model, lesson.router, lesson.config, lesson.budget
    assert budget is not None
    start, end = config.temperatures
    router.train()

    def loss_fn(batch_BT: Tensor, step: int, part: int) -> tuple[Tensor, dict[str, float]]:
        torch.manual_seed(derived_seed(lesson.seed, step, part, lesson.rank))  # for routers that draw
        router.temperature = start * (end / start) ** (step / max(1, lesson.steps - 1))
        output = model(input_ids=batch_BT, labels=batch_BT, policy=router, use_cache=False)
        off_budget = budget_loss(output.choices, budget, router)
        share = torch.stack([weights[..., Branch.BIG].mean() for weights in output.choices]).mean()
        loss = output.loss + config.budget_weight * off_budget
        return loss, {"nll": output.loss.item(), "big_share": share.item(), "temperature": router.temperature}

    return loss_fn


def budget_loss(weights: Sequence[Tensor], budget: float, router: Router) -> Tensor:
    """Mean over sequences of (mean cost over layers and tokens - budget)^2 (paper, section 5).

    Across layers, not per layer: layers may differ as long as the mean holds.

    Args:
        weights: per layer the soft choices [B, T, 3].
        budget: wanted mean cost; where nothing is skipped that is the share of big, 0 .. 1.
    """
    cost_B = torch.stack(
        [(each[..., list(router.branches)] * router.cost_C).sum(-1).mean(-1) for each in weights]
    ).mean(0)
    return (cost_B - budget).square().mean()
