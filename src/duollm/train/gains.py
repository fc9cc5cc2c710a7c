"""Regression of marginal gains: what a branch is worth at every token and layer, from one backward pass.

Shape letters: B batch, T tokens, L layers, C branches of the router.
"""

from typing import Any

import torch
from torch import Tensor

from duollm.routing.gains import GainsRouter
from duollm.routing.router import Router
from duollm.routing.sampling import derived_seed
from duollm.train.lesson import Lesson
from duollm.train.loop import LossFn
from duollm.train.marginal import RandomGates, centred, marginal_gains


def gains_loss(lesson: Lesson) -> LossFn:
    """Squared error of predicted marginal gains, with the hidden states of routes that mix all budgets.

    The gain of a branch counts from the mean over the router's branches, for only differences between branches decide.
    """
    model, router = lesson.model, lesson.router
    assert isinstance(router, GainsRouter)
    generator = torch.Generator(model.device)
    router.train()

    def loss_fn(batch_BT: Tensor, step: int, part: int) -> tuple[Tensor, dict[str, float]]:
        generator.manual_seed(derived_seed(lesson.seed, step, part))
        watched = _Watched(router, batch_BT, generator)
        gain_LBTC, nll = marginal_gains(model, batch_BT, watched)
        gain_LBTC = gain_LBTC * router.scale
        predicted_LBTC = torch.stack(watched.scores_LBTC)[:, :, :-1]
        loss = (centred(predicted_LBTC) - centred(gain_LBTC)).square().sum(-1).mean()
        return loss, {"nll": nll, "gain_variance": gain_LBTC.var().item()}

    return loss_fn


class _Watched(RandomGates):
    """Random choices, and what the router would have said."""

    def __init__(self, router: Router, batch_BT: Tensor, generator: torch.Generator) -> None:
        super().__init__(router.branches, batch_BT, generator)
        self.router = router
        self.scores_LBTC: list[Tensor] = []

    def begin(self, position_ids_BT: Tensor) -> Any:
        return self.router.hold(self.router.begin(position_ids_BT), self.big_B1 * self.router.num_layers)

    def __call__(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> tuple[Tensor, Any]:
        scores_BTC, memory = self.router.scores(layer_idx, states_BTD.detach(), memory)
        self.scores_LBTC.append(scores_BTC)
        gates_BT3, memory = super().__call__(layer_idx, states_BTD, memory)
        return gates_BT3, self.router.remember(layer_idx, gates_BT3.detach(), memory)
