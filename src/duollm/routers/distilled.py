"""Soft distillation: a router imitates the oracle's soft choices per layer, then is tuned on the language model's loss.

Shape letters: W windows, T tokens, N = T - 1 labelled tokens of a window, B windows of a batch, R routes,
L layers, C branches of the router.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from duollm.oracle.labels import Labels
from duollm.routers.base import Router
from duollm.routers.lesson import Lesson
from duollm.routers.linear import DistilledRouter
from duollm.routers.mixture import mixture_loss
from duollm.routes.sampling import derived_seed
from duollm.training.loop import LossFn

_RAREST = 0.01
"""A branch that the oracle takes less often at a layer weighs no more than if it took it this often."""


def distillation_loss(lesson: Lesson) -> LossFn:
    """Class-balanced cross-entropy with the oracle's per-layer marginals; from `distilled_share` on, the mixture loss.

    A token's oracle is a distribution over the routes with k big layers, softmax(-loss / `label_temperature`). Its
    marginal m at a layer is a branch's probability there. Each branch's term is weighted by 1 / p, its mean m over all
    labelled tokens, so that rare branches do not collapse; that shifts the best scores by -log p, so the prior log p
    is put back as the bias from which training starts and is left out of the loss (Menon et al., 2021). The states are
    those of forwards on routes drawn from the same distribution.
    """
    router, config, labels = lesson.router, lesson.config, lesson.labels
    assert isinstance(router, DistilledRouter)
    assert labels is not None
    assert lesson.budget is not None
    big_layers = round(lesson.budget * router.num_layers)
    indices = labels.with_big(big_layers, big_layers)
    routes_RL = labels.space.decode(labels.route_ids_R[indices])
    losses_WNR = labels.losses(indices, config.text_weight)
    device = lesson.model.device
    probability_WNR = route_probabilities(losses_WNR, config.label_temperature).to(device)
    marginal_WNLC = marginals(probability_WNR, routes_RL.to(device), router)
    prior_LC = marginal_WNLC.mean((0, 1)).clamp(min=_RAREST)
    with torch.no_grad():
        router.bias_LC.copy_(prior_LC.log())
    imitate = _imitation(lesson, labels, probability_WNR, routes_RL.to(device), marginal_WNLC, prior_LC)
    distilled = round(config.distilled_share * lesson.steps)
    tune = mixture_loss(replace(lesson, steps=lesson.steps - distilled))

    def loss_fn(batch_BT: Tensor, step: int, part: int) -> tuple[Tensor, dict[str, float]]:
        return imitate(batch_BT, step, part) if step < distilled else tune(batch_BT, step - distilled, part)

    return loss_fn


def route_probabilities(losses_WNR: Tensor, temperature: float) -> Tensor:
    """A distribution over routes that favours low losses, softmax(-loss / temperature), [W, N, R]."""
    return (-losses_WNR / temperature).softmax(-1)


def marginals(probability_WNR: Tensor, routes_RL: Tensor, router: Router) -> Tensor:
    """The probability of each of the router's branches at each layer, [W, N, L, C]."""
    taken_RLC = (routes_RL[..., None] == router.values_C).float()
    return torch.einsum("wnr,rlc->wnlc", probability_WNR, taken_RLC)


def _imitation(
    lesson: Lesson,
    labels: Labels,
    probability_WNR: Tensor,
    routes_RL: Tensor,
    marginal_WNLC: Tensor,
    prior_LC: Tensor,
) -> Callable[[Tensor, int, int], tuple[Tensor, dict[str, float]]]:
    """The loss of a batch of labelled windows, drawn at random, as many as there are sequences."""
    model, router = lesson.model, lesson.router
    generator = torch.Generator(model.device)
    token_ids_WT = labels.token_ids_WT.to(model.device)

    def loss_fn(batch_BT: Tensor, step: int, part: int) -> tuple[Tensor, dict[str, float]]:
        generator.manual_seed(derived_seed(lesson.seed, step, part, lesson.rank))
        window_B = torch.randint(len(token_ids_WT), (len(batch_BT),), generator=generator, device=model.device)
        drawn_M1 = torch.multinomial(probability_WNR[window_B].flatten(0, 1), 1, generator=generator)
        watched = _Watched(router, routes_RL[drawn_M1.view(len(batch_BT), -1)])
        with torch.no_grad():
            model.model(input_ids=token_ids_WT[window_B, :-1], policy=watched, use_cache=False)
        scores_BNLC = torch.stack(watched.scores_LBNC, dim=2) - prior_LC.log()
        weighted_BNLC = marginal_WNLC[window_B] / (prior_LC * len(router.branches))
        loss = -(weighted_BNLC * scores_BNLC.log_softmax(-1)).sum(-1).mean()
        return loss, {"imitation": loss.item()}

    return loss_fn


class _Watched:
    """Given routes [B, N, L], and what the router would have said on them."""

    def __init__(self, router: Router, routes_BNL: Tensor) -> None:
        self.router, self.routes_BNL = router, routes_BNL
        self.scores_LBNC: list[Tensor] = []

    def __call__(self, layer_idx: int, states_BND: Tensor, memory: Any) -> tuple[Tensor, Any]:
        with torch.enable_grad():
            scores_BNC, memory = self.router.scores(layer_idx, states_BND.detach(), memory)
        self.scores_LBNC.append(scores_BNC)
        return self.routes_BNL[..., layer_idx], memory
