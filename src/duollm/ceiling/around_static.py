"""The ceiling's choices around static: what groups are worth is measured, and only tokens' differences are predicted.

Shape letters: W windows, B windows per forward, T tokens, J groups of layers, C branches to choose from.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from duollm.ceiling.choices import price_for, priced_choice
from duollm.ceiling.predictor import GainPredictor, all_big_states
from duollm.measure.executor import policy_losses
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.records.keys import SHUFFLED
from duollm.routers.static import SCALES, Prior, chosen_scale
from duollm.routes.space import RouteSpace

_BATCH = 16


@dataclass(frozen=True)
class AroundStatic:
    """Margins of big as static's prior plus scale x (predicted - mean predicted).

    Attributes:
        space: the routes, of two branches.
        priors: static by budget.
        mean_J: by predictor, the mean of its margins on validation text.
        scales: by predictor and budget.
    """

    space: RouteSpace
    priors: Mapping[int, Prior]
    mean_J: dict[str, Tensor]
    scales: dict[tuple[str, int], float]

    @classmethod
    @torch.inference_mode()
    def chosen(
        cls,
        model: DuoForCausalLM,
        predictors: nn.ModuleDict,
        space: RouteSpace,
        priors: Mapping[int, Prior],
        validation_WT: Tensor,
        chooses_in: Callable[[], AbstractContextManager[Any]],
    ) -> "AroundStatic":
        """Choose for every predictor and budget the scale that surely gains most on validation text.

        The control takes the scale of the deepest predictor. Chosen by its own loss it would choose static.

        Args:
            chooses_in: the precision in which the losses are compared.
        """

        def losses_of(routes: Tensor) -> Tensor:
            with chooses_in():
                return policy_losses(model, validation_WT, routes=routes)[0]

        parts: dict[str, list[Tensor]] = {name: [] for name in predictors}
        for batch_BT in validation_WT.split(_BATCH):
            states_BTF = all_big_states(model, batch_BT)
            for name, predictor in predictors.items():
                parts[name].append(cast(GainPredictor, predictor).from_states(states_BTF))
        gains = {name: torch.cat(each) for name, each in parts.items()}
        means = {name: _beats(gains_WTJC).mean((0, 1)) for name, gains_WTJC in gains.items()}
        scales: dict[tuple[str, int], float] = {}
        for k, prior in priors.items():
            static_WT = losses_of(prior.route_L)
            for name in (each for each in predictors if each != SHUFFLED):
                losses = {0.0: static_WT}
                for scale in SCALES[:-1]:
                    tried = cls(space, priors, means, {(name, k): scale})
                    margin_WTJ, otherwise_WTJ = tried.margins(name, k, gains[name])
                    price = price_for(margin_WTJ, k, space)
                    routes_WTL = space.spread(priced_choice(margin_WTJ, otherwise_WTJ, price))
                    losses[scale] = losses_of(routes_WTL)
                scales[name, k] = scales[SHUFFLED, k] = chosen_scale(losses)
        return cls(space, priors, means, scales)

    def margins(self, name: str, big_layers: int, gains: Tensor) -> tuple[Tensor, Tensor]:
        """Return the margin of big and the other branch, [., J] each, from a predictor's gains [., J, C]."""
        prior = self.priors[big_layers]
        margin = prior.worth_J + self.scales[name, big_layers] * (_beats(gains) - self.mean_J[name])
        return margin, torch.full_like(margin, int(self.space.branches[0]), dtype=torch.int64)


def _beats(gains: Tensor) -> Tensor:
    return gains[..., 1] - gains[..., 0]
