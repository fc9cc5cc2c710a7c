"""What a router is trained to do: loss functions for the training loop, by name.

Shape letters: B batch, T tokens, L layers, C branches of the router.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from duollm.config import RouterConfig
from duollm.models.branch import Branch
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.routing.gains import GainsRouter
from duollm.routing.router import Router
from duollm.routing.sampling import derived_seed
from duollm.train.loop import LossFn


@dataclass(frozen=True)
class Lesson:
    """One training of one router.

    Attributes:
        budget: wanted mean cost per layer (`duollm.routing.router.branch_costs`); None for a router that serves all.
        steps: optimiser steps of the training.
        seed: of whatever is drawn.
    """

    model: DuoForCausalLM
    router: Router
    config: RouterConfig
    budget: float | None
    steps: int
    seed: int


def mixture_loss(lesson: Lesson) -> LossFn:
    """CE + alpha * budget loss of the softly mixed model; the temperature falls geometrically (paper, section 5)."""
    model, router, config, budget = lesson.model, lesson.router, lesson.config, lesson.budget
    assert budget is not None
    start, end = config.temperatures
    router.train()

    def loss_fn(batch_BT: Tensor, step: int, part: int) -> tuple[Tensor, dict[str, float]]:
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


def gains_loss(lesson: Lesson) -> LossFn:
    """Squared error of predicted marginal gains, with the hidden states of routes that mix all budgets.

    In each sequence every (token, layer) draws its branch, big with a probability of that sequence's own. The model
    runs with these choices as gate weights w; -dL/dw of the summed nll L of the batch is what a branch gains, to first
    order, including what the token's keys and values do to later tokens. The gain of a branch counts from the mean
    over the router's branches, for only differences between branches decide.
    """
    model, router = lesson.model, lesson.router
    assert isinstance(router, GainsRouter)
    generator = torch.Generator(model.device)
    router.train()

    def loss_fn(batch_BT: Tensor, step: int, part: int) -> tuple[Tensor, dict[str, float]]:
        generator.manual_seed(derived_seed(lesson.seed, step, part))
        watched = _Gates(router, batch_BT, generator)
        logits_BTV = model(input_ids=batch_BT, policy=watched, use_cache=False).logits
        nll = cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), batch_BT[:, 1:].flatten(), reduction="sum")
        slopes = torch.autograd.grad(nll, watched.gates_LBT3)
        branches = list(router.branches)
        gain_LBTC = -torch.stack(slopes)[:, :, :-1, branches].float() * router.scale
        predicted_LBTC = torch.stack(watched.scores_LBTC)[:, :, :-1]
        error = _centred(predicted_LBTC) - _centred(gain_LBTC)
        loss = error.square().sum(-1).mean()
        return loss, {"nll": nll.item() / batch_BT[:, 1:].numel(), "gain_variance": gain_LBTC.var().item()}

    return loss_fn


class _Gates:
    """Random choices as gate weights whose gradient is wanted, and what the router would have said."""

    def __init__(self, router: Router, batch_BT: Tensor, generator: torch.Generator) -> None:
        self.router, self.generator = router, generator
        self.gates_LBT3: list[Tensor] = []
        self.scores_LBTC: list[Tensor] = []
        self.big_B1 = torch.rand(len(batch_BT), 1, generator=generator, device=batch_BT.device)

    def __call__(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> tuple[Tensor, Any]:
        scores_BTC, memory = self.router.scores(layer_idx, states_BTD.detach(), memory)
        self.scores_LBTC.append(scores_BTC)
        branches = self.router.values_C
        draw = {"generator": self.generator, "device": states_BTD.device}
        big_BT = torch.rand(states_BTD.shape[:2], **draw) < self.big_B1
        other_BT = torch.randint(len(branches) - 1, states_BTD.shape[:2], **draw)
        choice_BT = branches[torch.where(big_BT, len(branches) - 1, other_BT)]
        gates_BT3 = torch.nn.functional.one_hot(choice_BT, len(Branch)).to(states_BTD.dtype).requires_grad_()
        self.gates_LBT3.append(gates_BT3)
        return gates_BT3, memory


def _centred(values: Tensor) -> Tensor:
    """Less the mean over the last dimension."""
    return values - values.mean(-1, keepdim=True)


OBJECTIVES: dict[str, Callable[[Lesson], LossFn]] = {"mixture": mixture_loss, "gains": gains_loss}
"""How routers are trained, by the name in `Router.objective`."""
