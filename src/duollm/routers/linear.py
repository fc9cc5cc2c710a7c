"""The paper's router: one linear map per layer (paper, section 5), its straight-through variant, and a distilled one.

Shape letters: B batch, T tokens, L layers, C branches of the router, D hidden, F inputs of a layer's map, W labelled
windows, N = T - 1 labelled tokens of a window, M = B * N, R routes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gumbel_softmax, linear

from duollm.config import RouterConfig
from duollm.errors import UserError
from duollm.models.branch import Branch
from duollm.models.configuration_duo import DuoConfig
from duollm.routers.base import LABEL_SETTINGS, Listener, Router, RouterTraining, mixture_loss
from duollm.training.loop import LossFn

_RAREST = 0.01
"""A branch that the oracle takes less often at a layer weighs no more than if it took it this often."""


class LinearRouter(Router):
    """Scores the branches of each layer by a linear map of the hidden states.

    Args:
        inputs: number of inputs of each map, if a kind gives it more than the D numbers of the states.
    """

    def __init__(self, config: DuoConfig, branches: Sequence[Branch], inputs: int | None = None) -> None:
        super().__init__(config, branches)
        self.inputs = inputs or self.hidden_size
        self.weight_LCD = nn.Parameter(torch.zeros(self.num_layers, len(self.branches), self.inputs))
        self.bias_LC = nn.Parameter(torch.zeros(self.num_layers, len(self.branches)))

    def inputs_of(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> Tensor:
        """Return the inputs of a layer's map, [B, T, inputs]; by default the states."""
        return states_BTD

    def scores(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """Return the scores of the branches, [B, T, C], float32."""
        inputs_BTF, weight_CF = self.inputs_of(layer_idx, states_BTD, memory), self.weight_LCD[layer_idx]
        return linear(inputs_BTF, weight_CF.to(states_BTD.dtype)).float() + self.bias_LC[layer_idx], memory

    def margin(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> tuple[Tensor, Tensor, Any]:
        """Compute the margin; two branches need only one product, with the difference of their maps."""
        if len(self.branches) > 2:
            return super().margin(layer_idx, states_BTD, memory)
        inputs_BTF = self.inputs_of(layer_idx, states_BTD, memory)
        (other_F, big_F), (other, big) = self.weight_LCD[layer_idx], self.bias_LC[layer_idx]
        margin_BT = (inputs_BTF @ (big_F - other_F).to(states_BTD.dtype)).float() + (big - other)
        return margin_BT, self.values_C[0], memory

    def flops_per_token(self) -> int:
        """Count one product per decision with the difference of two maps, or one per branch if there are three."""
        maps = 1 if len(self.branches) == 2 else len(self.branches)
        return 2 * len(self.space.leaders) * maps * self.inputs


class GumbelRouter(LinearRouter):
    """A linear router that draws hard choices in training: straight-through Gumbel softmax (Jang et al., 2017).

    The forward pass takes one branch per token, as in use. The gradient is that of the soft mixture.
    """

    def mix(self, scores_BTC: Tensor) -> Tensor:
        """Draw one-hot weights [B, T, C] whose gradient is that of the softmax of the perturbed scores."""
        return gumbel_softmax(scores_BTC, self.temperature, hard=True)


class DistilledRouter(GumbelRouter):
    """Soft distillation: it first imitates the oracle's soft choices, then is fine-tuned as a Gumbel router."""

    settings = (*GumbelRouter.settings, *LABEL_SETTINGS, "label_temperature", "distilled_share")
    needs_labels = True

    @classmethod
    def check(cls, config: RouterConfig, sequence_length: int) -> None:
        """Refuse `train_backbone` if all steps imitate, because imitation does not train the model."""
        if config.train_backbone and config.distilled_share == 1:
            raise UserError("train_backbone: with distilled_share 1, training distilled leaves the model as it is")

    def loss_fn(self, training: RouterTraining) -> LossFn:
        """Return the imitation loss for the first `distilled_share` of the steps, and the mixture loss after them."""
        steps = training.trainer.plan.steps
        distilled = round(training.config.distilled_share * steps)
        imitate, tune = imitation_loss(self, training), mixture_loss(self, training, steps - distilled)

        def loss_fn(batch_BT: Tensor, step: int, part: int) -> tuple[Tensor, dict[str, float]]:
            return imitate(batch_BT, step, part) if step < distilled else tune(batch_BT, step - distilled, part)

        return loss_fn


def imitation_loss(router: DistilledRouter, training: RouterTraining) -> LossFn:
    """Return the class-balanced cross-entropy with the oracle's marginals per layer, on random labelled windows.

    The oracle of a token is a distribution over the routes with k big layers, softmax(-loss / `label_temperature`). Its
    marginal m at a layer is the probability of a branch there. The term of each branch is weighted by 1 / p, where p is
    the mean of m over all labelled tokens, so that rare branches are not given up. This shifts the best scores by
    -log p. So the prior log p becomes the bias from which training starts, and is left out of the loss (Menon et al.,
    2021). The states come from forward passes on routes drawn from the same distribution.
    """
    model, config, labels = training.model, training.config, training.labels
    assert labels is not None
    indices = labels.with_big(training.big_layers, training.big_layers)
    routes_RL = labels.space.decode(labels.route_ids_R[indices]).to(model.device)
    losses_WNR = labels.losses(indices, config.text_weight)
    probability_WNR = (-losses_WNR / config.label_temperature).softmax(-1).to(model.device)
    marginal_WNLC = marginals(probability_WNR, routes_RL, router)
    prior_LC = marginal_WNLC.mean((0, 1)).clamp(min=_RAREST)
    with torch.no_grad():
        router.bias_LC.copy_(prior_LC.log())
    generator, token_ids_WT = torch.Generator(model.device), labels.token_ids_WT.to(model.device)

    def loss_fn(batch_BT: Tensor, step: int, part: int) -> tuple[Tensor, dict[str, float]]:
        generator.manual_seed(training.seed_of(step, part))
        window_B = torch.randint(len(token_ids_WT), (len(batch_BT),), generator=generator, device=model.device)
        drawn_M1 = torch.multinomial(probability_WNR[window_B].flatten(0, 1), 1, generator=generator)
        seen = Listener(routes_RL[drawn_M1.view(len(batch_BT), -1)])
        with torch.no_grad():
            model.model(input_ids=token_ids_WT[window_B, :-1], policy=seen, use_cache=False)
        scores_LBNC = [router.scores(layer, states_BND, None)[0] for layer, states_BND in enumerate(seen.states_LBTD)]
        scores_BNLC = torch.stack(scores_LBNC, dim=2) - prior_LC.log()
        weighted_BNLC = marginal_WNLC[window_B] / (prior_LC * len(router.branches))
        loss = -(weighted_BNLC * scores_BNLC.log_softmax(-1)).sum(-1).mean()
        return loss, {"imitation": loss.item()}

    return loss_fn


def marginals(probability_WNR: Tensor, routes_RL: Tensor, router: Router) -> Tensor:
    """Return the probability of each of the router's branches at each layer, [W, N, L, C]."""
    taken_RLC = (routes_RL[..., None] == router.values_C).float()
    return torch.einsum("wnr,rlc->wnlc", probability_WNR, taken_RLC)
