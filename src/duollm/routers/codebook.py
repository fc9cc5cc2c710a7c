"""Routers that pick, early and once, one of a few whole routes.

A greedy search chooses the routes. `CodebookRouter` predicts their losses by a ridge regression, in closed form.

Shape letters: B batch, T tokens, W windows, N labelled tokens of a window, M = W * N labelled tokens, L layers,
C branches of the router, D hidden, F = D + 1 features, R routes, J penalties.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from duollm.config import LARGEST_CODEBOOK, RouterConfig
from duollm.errors import UserError
from duollm.models.branch import Branch
from duollm.models.configuration_duo import DuoConfig
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.oracle.labels import Labels
from duollm.ridge import ridge
from duollm.routers.base import LABEL_SETTINGS, Listener, Router, RouterTraining, branch_costs
from duollm.routes.space import RouteSpace

FOLDS = 4
"""Predictions are cross-fitted over so many parts of the text."""
_PENALTIES = tuple(10.0**power for power in range(-3, 4))
_BATCH = 16


class RouteChooser(Router):
    """Base of the kinds that predict the loss of each of a few routes at layer `decide_at`, and take the lowest.

    All routes are the same before that layer. A big layer adds `price` to the prediction, so that routes of
    neighbouring budgets together meet the budget on average. From `decide_at` on it is known which tokens take the same
    route. The memory is the index of the route taken; before `decide_at` it is the exact number of big layers, or None.

    A kind says how losses are predicted: `lowered`, `cross_fit` and `keep`.

    Attributes:
        saved: names of the whole numbers that are saved with the weights.
        routes_RL: the codebook, `LARGEST_CODEBOOK` rows. A row with bias -inf is not in use.
    """

    settings: ClassVar[tuple[str, ...]] = (*LABEL_SETTINGS, "codebook_routes", "decide_at")
    saved: ClassVar[tuple[str, ...]] = ("decide_at",)
    needs_labels = True
    joint = False
    routes_RL: Tensor
    branch_cost_3: Tensor

    def __init__(self, config: DuoConfig, branches: Sequence[Branch]) -> None:
        super().__init__(config, branches)
        space = RouteSpace(self.num_layers, self.branches)
        spread_R = torch.linspace(0, 1, LARGEST_CODEBOOK, dtype=torch.float64) * (space.size - 1)
        self.decide_at = 0
        self.register_buffer("routes_RL", space.decode(spread_R.long()))
        self.register_buffer("branch_cost_3", branch_costs(config, branches), persistent=False)
        self.bias_R = nn.Parameter(torch.zeros(LARGEST_CODEBOOK))

    def lowered(self, states_BTD: Tensor) -> Tensor:
        """Return by how many nats each route lowers the loss, up to `bias_R`, [B, T, R], float32."""
        raise NotImplementedError

    def cross_fit(self, states_MD: Tensor, loss_MR: Tensor, fold_M: Tensor, config: RouterConfig) -> Tensor:
        """Predict the losses of the tokens of each fold from the other folds, [M, R]."""
        raise NotImplementedError

    def keep(self, states_MD: Tensor, loss_MR: Tensor) -> None:
        """Fit the predictions of the chosen routes, the first of `routes_RL`. The bias of the others is -inf."""
        raise NotImplementedError

    def get_extra_state(self) -> Tensor:
        """Return the numbers that are saved with the weights."""
        return torch.tensor([getattr(self, name) for name in self.saved])

    def set_extra_state(self, state: Any) -> None:
        """Restore the numbers that were saved with the weights."""
        for name, number in zip(self.saved, state.flatten().tolist(), strict=True):
            setattr(self, name, number)

    def begin(self, position_ids_BT: Tensor, big_layers: int | Tensor | None = None) -> Any:
        """Return `big_layers`: tokens choose among the routes with exactly this many big layers, if there are any."""
        return big_layers

    def worth(self, states_BTD: Tensor, exactly: Any) -> Tensor:
        """Return how far the predicted loss of each route lies below the mean, minus its price, nats [B, T, R]."""
        toll_R = self.price * self.branch_cost_3[self.routes_RL].sum(-1)
        worth_BTR = self.lowered(states_BTD) + self.bias_R - toll_R
        if exactly is None:
            return worth_BTR
        wrong_R = (self.routes_RL == Branch.BIG).sum(-1) != exactly
        none_left = (wrong_R | self.bias_R.isinf()).all()
        return worth_BTR.masked_fill(wrong_R & ~none_left, -torch.inf)

    def decide(
        self, layer_idx: int, states_BTD: Tensor, memory: Any, price: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """Choose for one layer, integers [B, T]. The layer's price is ignored."""
        if layer_idx < self.decide_at:
            return self.routes_RL[0, layer_idx].expand(states_BTD.shape[:2]), memory
        if layer_idx == self.decide_at:
            memory = self.worth(states_BTD, memory).argmax(-1)
        return self.routes_RL[:, layer_idx][memory], memory

    def margin(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> tuple[Tensor, Tensor, Any]:
        """Return price 0 everywhere, because whole routes are chosen, without a price per layer."""
        choice_BT, memory = self.decide(layer_idx, states_BTD, memory)
        return states_BTD.new_zeros(choice_BT.shape), choice_BT, memory

    @classmethod
    def check(cls, config: RouterConfig, sequence_length: int) -> None:
        """Refuse too few labels."""
        if config.label_tokens < sequence_length:
            raise UserError(
                f"label_tokens ({config.label_tokens}): codebook and knn are cross-fitted over windows; "
                f"give at least {sequence_length} for two of them"
            )

    @torch.no_grad()
    def fit(self, training: RouterTraining) -> None:
        """Choose the routes and fit the predictions to the labels, in closed form.

        Static is the route with k big layers and the lowest mean loss. Candidates are the labelled routes with k - 1, k
        or k + 1 big layers that start like static.
        """
        config, labels = training.config, training.labels
        assert labels is not None
        big_layers = training.big_layers
        self.decide_by(config.decide_at)
        device = training.model.device
        routes_RL, losses_WNR, static, price = _candidates(labels, big_layers, self.decide_at, config.text_weight)
        routes_RL, loss_MR = routes_RL.to(device), losses_WNR.flatten(0, 1).to(device)
        states_MD = _states(training.model, labels.token_ids_WT, routes_RL[static], self.decide_at)
        toll_R = price * ((routes_RL == Branch.BIG).sum(-1) - big_layers)
        self.choose(routes_RL, static, toll_R, states_MD, loss_MR, len(labels.token_ids_WT), config)

    def decide_by(self, layer_idx: int) -> None:
        """Set `decide_at` to the last of the layers up to this one that decide: where layers vary in groups, few do."""
        leaders = self.space.leaders
        self.decide_at = max([leader for leader in leaders if leader <= layer_idx], default=leaders[0])

    def choose(
        self,
        routes_RL: Tensor,
        static: int,
        toll_R: Tensor,
        states_MD: Tensor,
        loss_MR: Tensor,
        windows: int,
        config: RouterConfig,
    ) -> None:
        """Choose the codebook among some routes (`choose_routes`), and fit the predictions of their losses.

        For the choice, predictions are cross-fitted: those of a window come from other windows, so that no token
        chooses a route by its own label.

        Args:
            static: the index of the route that comes first.
            toll_R: what is added to the losses of each route, nats.
            windows: number of windows from which the M states come, the same number from each.
        """
        fold_M = torch.arange(windows, device=loss_MR.device).repeat_interleave(len(loss_MR) // windows) % FOLDS
        predicted_MR = self.cross_fit(states_MD, loss_MR, fold_M, config)
        chosen = choose_routes(loss_MR + toll_R, predicted_MR + toll_R, static, config.codebook_routes)
        self.routes_RL[:] = routes_RL[static]
        self.routes_RL[: len(chosen)] = routes_RL[chosen]
        self.bias_R.fill_(-torch.inf)
        self.keep(states_MD, loss_MR[:, chosen])


class CodebookRouter(RouteChooser):
    """Predicts the losses by a linear map, a ridge regression with the penalty that predicts other windows best."""

    def __init__(self, config: DuoConfig, branches: Sequence[Branch]) -> None:
        super().__init__(config, branches)
        self.weight_RD = nn.Parameter(torch.zeros(LARGEST_CODEBOOK, self.hidden_size))
        self.penalty = _PENALTIES[0]

    def lowered(self, states_BTD: Tensor) -> Tensor:
        """Return by how many nats each route lowers the loss, up to `bias_R`, [B, T, R], float32."""
        return nn.functional.linear(states_BTD, self.weight_RD.to(states_BTD.dtype)).float()

    def cross_fit(self, states_MD: Tensor, loss_MR: Tensor, fold_M: Tensor, config: RouterConfig) -> Tensor:
        """Predict each fold from the others with the best penalty, [M, R]."""
        self.penalty, predicted_MR = cross_fitted(states_MD, loss_MR, fold_M)
        return predicted_MR

    def keep(self, states_MD: Tensor, loss_MR: Tensor) -> None:
        """Fit the linear map of the chosen routes."""
        weight_DR, bias_R = regress(states_MD, loss_MR, [self.penalty])[0].split([states_MD.shape[1], 1])
        self.weight_RD.zero_()[: loss_MR.shape[1]] = -weight_DR.T
        self.bias_R[: loss_MR.shape[1]] = -bias_R[0]

    def flops_per_token(self) -> int:
        """Count one product per route in use, at one layer."""
        return 2 * int(self.bias_R.isfinite().sum()) * self.hidden_size


def choose_routes(loss_MR: Tensor, predicted_MR: Tensor, first: int, number: int) -> list[int]:
    """Choose routes greedily, so that the mean loss is low when each token takes the route with the lowest prediction.

    The choice starts with `first`. Each step adds the route that lowers the mean loss most, until there are `number`
    routes or none lowers it.

    Args:
        loss_MR: the losses that count.
        predicted_MR: the predictions by which tokens take a route, in the same units.

    Returns: indices of routes, in the order in which they were chosen.
    """
    chosen = [first]
    best_M, loss_M = predicted_MR[:, first].clone(), loss_MR[:, first].clone()
    while len(chosen) < number:
        gain_MR = torch.where(predicted_MR < best_M[:, None], loss_M[:, None] - loss_MR, 0.0)
        gain_R = gain_MR.mean(0)
        following = int(gain_R.argmax())
        if gain_R[following] <= 0:
            break
        taken_M = predicted_MR[:, following] < best_M
        best_M = torch.where(taken_M, predicted_MR[:, following], best_M)
        loss_M = torch.where(taken_M, loss_MR[:, following], loss_M)
        chosen.append(following)
    return chosen


def price_of_big(mean_R: Tensor, big_R: Tensor) -> float:
    """Return by how many nats one more big layer lowers the lowest mean loss of routes, given their big layers."""
    budgets = big_R.unique().tolist()
    lowest = [mean_R[big_R == big].min().item() for big in budgets]
    return max(0.0, (lowest[0] - lowest[-1]) / max(1, budgets[-1] - budgets[0]))


def cross_fitted(states_MD: Tensor, loss_MR: Tensor, fold_M: Tensor) -> tuple[float, Tensor]:
    """Predict each fold from the others; return the penalty with the lowest squared error and its predictions."""
    predicted_JMR = loss_MR.new_empty(len(_PENALTIES), *loss_MR.shape)
    ones_M1 = states_MD.new_ones(len(states_MD), 1)
    for fold in fold_M.unique():
        held_M = fold_M == fold
        fitted_JFR = regress(states_MD[~held_M], loss_MR[~held_M], _PENALTIES)
        predicted_JMR[:, held_M] = torch.cat([states_MD, ones_M1], dim=1)[held_M] @ fitted_JFR
    best = int((predicted_JMR - loss_MR).square().mean((1, 2)).argmin())
    return _PENALTIES[best], predicted_JMR[best]


def regress(states_MD: Tensor, loss_MR: Tensor, penalties: Sequence[float]) -> Tensor:
    """Return weights and, in the last row, intercepts [J, F, R] of the ridge regressions with these penalties.

    A penalty is relative to the mean variance of a feature times the number of tokens. Intercepts are not penalised.
    """
    mean_D, mean_R = states_MD.mean(0), loss_MR.mean(0)
    centred_MD = (states_MD - mean_D).double()
    product_DD, aimed_DR = centred_MD.T @ centred_MD, centred_MD.T @ (loss_MR - mean_R).double()
    fitted = []
    for penalty in penalties:
        weight_DR = ridge(product_DD, aimed_DR, penalty, held=len(product_DD))
        fitted.append(torch.cat([weight_DR, (mean_R - mean_D.double() @ weight_DR)[None]]))
    return torch.stack(fitted).to(loss_MR.dtype)


def _candidates(
    labels: Labels, big_layers: int, decide_at: int, text_weight: float
) -> tuple[Tensor, Tensor, int, float]:
    """Collect what the labels offer around the budget.

    Returns:
        routes [R, L]; losses [W, N, R], less their mean over routes, nats; the index of static; and by how many nats
        one more big layer lowers the loss of the best single route.
    """
    indices = labels.with_big(big_layers - 1, big_layers + 1)
    routes_RL, losses_WNR = labels.space.decode(labels.route_ids_R[indices]), labels.losses(indices, text_weight)
    big_R, mean_R = (routes_RL == Branch.BIG).sum(-1), losses_WNR.mean((0, 1))
    static = int(mean_R.masked_fill(big_R != big_layers, torch.inf).argmin())
    alike_R = (routes_RL[:, :decide_at] == routes_RL[static, :decide_at]).all(-1)
    price = price_of_big(mean_R, big_R)
    return routes_RL[alike_R], losses_WNR[..., alike_R], int(alike_R[:static].sum()), price


def _states(model: DuoForCausalLM, token_ids_WT: Tensor, static_L: Tensor, decide_at: int) -> Tensor:
    """What the router sees of the labelled tokens at layer `decide_at`, [M, D]; float32."""
    seen: list[Tensor] = []
    for part_BT in token_ids_WT[:, :-1].to(model.device).split(_BATCH):
        listener = Listener(static_L)
        model.model(input_ids=part_BT, policy=listener, use_cache=False)
        seen.append(listener.states_LBTD[decide_at].flatten(0, 1).float())
    return torch.cat(seen)
