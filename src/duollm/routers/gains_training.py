"""Regression of marginal gains: what a branch is worth at every token and layer, from one backward pass.

Shape letters: B batch, T tokens, L layers, C branches of the router.
"""

from typing import Any

import torch
from torch import Tensor

from duollm.models.modeling_duo import DuoForCausalLM
from duollm.routers.base import Router
from duollm.routers.gains import GAIN_SCALE
from duollm.routers.lesson import Lesson
from duollm.routers.marginal import RandomGates, centred, explored_share, marginal_gains
from duollm.routes.sampling import derived_seed
from duollm.training.loop import LossFn

_PRICED_SEQUENCES = 2


def gains_loss(lesson: Lesson) -> LossFn:
    """Squared error of predicted marginal gains, along routes that the router itself would take.

    What a layer gains depends on what the others do, so gains are measured where the router will be: each sequence
    gets a share of big of its own, uniform in 0 .. 1, and the router decides at the price of that share; some choices
    stay random. The gain of a branch counts from the mean over the router's branches: only differences decide.
    """
    model, router = lesson.model, lesson.router
    generator = torch.Generator(model.device)
    router.train()

    def loss_fn(batch_BT: Tensor, step: int, part: int) -> tuple[Tensor, dict[str, float]]:
        generator.manual_seed(derived_seed(lesson.seed, step, part, lesson.rank))
        watched = Watched(router, batch_BT, generator)
        watched.random_share = explored_share(step / lesson.steps)
        watched.price_B1 = prices(model, watched, batch_BT)
        gain_LBTC, nll = marginal_gains(model, batch_BT, watched)
        gain_LBTC = gain_LBTC * GAIN_SCALE
        predicted_LBTC = torch.stack(watched.scores_LBTC)[:, :, :-1]
        loss = (centred(predicted_LBTC) - centred(gain_LBTC)).square().sum(-1).mean()
        return loss, {"nll": nll, "gain_variance": gain_LBTC.var().item()}

    return loss_fn


@torch.no_grad()
def prices(model: DuoForCausalLM, watched: "Watched", batch_BT: Tensor) -> Tensor:
    """The prices at which the router spends each sequence's share of big, [B, 1], estimated on a few of them.

    They are a function of the weights and the step alone, so that a resumed training repeats an uninterrupted one.
    """
    sample_BT = batch_BT[:_PRICED_SEQUENCES]
    margins = _Margins(watched.router, sample_BT, watched.generator)
    model.model(input_ids=sample_BT, policy=margins, use_cache=False)
    return torch.cat(margins.seen).quantile((1 - watched.big_B1).flatten())[:, None]


class Watched(RandomGates):
    """The router's own choices at a price of each sequence's, some of them random, and its scores.

    Attributes:
        price_B1: the price of big in each sequence.
    """

    price_B1: Tensor

    def __init__(self, router: Router, batch_BT: Tensor, generator: torch.Generator) -> None:
        super().__init__(router.branches, batch_BT, generator)
        self.router = router
        self.scores_LBTC: list[Tensor] = []

    def begin(self, position_ids_BT: Tensor) -> Any:
        """The router's memory, told of each sequence's share."""
        return self.router.hold(self.router.begin(position_ids_BT), self.big_B1 * self.router.num_layers)

    def __call__(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """Choose for one layer, weights [B, T, 3], and note the scores."""
        scores_BTC, memory = self.router.scores(layer_idx, states_BTD.detach(), memory)
        self.scores_LBTC.append(scores_BTC)
        gates_BT3 = self.gate(self.choose(scores_BTC.detach(), states_BTD), states_BTD)
        return gates_BT3, self.router.remember(layer_idx, gates_BT3.detach(), memory)

    def choose(self, scores_BTC: Tensor, states_BTD: Tensor) -> Tensor:
        """Mix what the router would choose with random draws, integers [B, T]."""
        worth_BTC = scores_BTC - self.price_B1[..., None] * self.router.cost_C
        own_BT = self.branches_C[worth_BTC.argmax(-1)]
        return self.explore(own_BT, states_BTD)


class _Margins(Watched):
    """Random choices, and by how much the router would prefer big to its best other branch."""

    def __init__(self, router: Router, batch_BT: Tensor, generator: torch.Generator) -> None:
        super().__init__(router, batch_BT, generator)
        self.seen: list[Tensor] = []

    def choose(self, scores_BTC: Tensor, states_BTD: Tensor) -> Tensor:
        """Note the margins and draw."""
        self.seen.append((scores_BTC[..., -1] - scores_BTC[..., :-1].amax(-1)).flatten())
        return self.draw(states_BTD)
