"""Fitting a codebook router: predict routes' losses in closed form, then choose the routes that make the most of it.

Shape letters: W windows, N labelled tokens of a window, M = W * N labelled tokens, R routes, L layers,
D hidden, F = D + 1 features, P penalties.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from duollm.models.branch import Branch
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.oracle.labels import Labels
from duollm.routers.codebook import CodebookRouter
from duollm.routers.lesson import Lesson

_FOLDS = 4
_PENALTIES = tuple(10.0**power for power in range(-3, 4))
_BATCH = 16


def fit_codebook(lesson: Lesson) -> None:
    """Choose the router's routes and fit its predictions to the labels.

    Candidates are the labelled routes with k - 1, k or k + 1 big layers that start like static, the route with k of
    lowest mean loss. A ridge regression from the states at layer `decide_at` predicts each candidate's loss. For the
    choice of the routes its predictions are cross-fitted: those of a window come from the other windows, so that
    no token's own label speaks for a route (`choose_routes`).
    """
    router, config, labels = lesson.router, lesson.config, lesson.labels
    assert isinstance(router, CodebookRouter)
    assert labels is not None
    assert lesson.budget is not None
    big_layers = round(lesson.budget * router.num_layers)
    router.decide_at = min(config.decide_at, router.num_layers - 1)
    candidates = _candidates(labels, big_layers, router.decide_at, config.text_weight, router)
    loss_MR = candidates.losses_WNR.flatten(0, 1).to(lesson.model.device)
    states_MD = _states(lesson.model, labels.token_ids_WT, candidates.static_L, router.decide_at)
    fold_M = torch.arange(len(labels.token_ids_WT)).repeat_interleave(len(loss_MR) // len(labels.token_ids_WT))
    penalty, predicted_MR = cross_fitted(states_MD, loss_MR, (fold_M % _FOLDS).to(loss_MR.device))
    toll_R = candidates.price * (candidates.big_R - big_layers)
    chosen = choose_routes(loss_MR + toll_R, predicted_MR + toll_R, candidates.static, config.codebook_routes)
    weight_DR, bias_R = ridge(states_MD, loss_MR[:, chosen], [penalty])[0].split([states_MD.shape[1], 1])
    with torch.no_grad():
        router.bias_R.fill_(-torch.inf)
        router.routes_RL[: len(chosen)] = candidates.routes_RL[chosen]
        router.routes_RL[len(chosen) :] = candidates.static_L
        router.weight_RD.zero_()[: len(chosen)] = -weight_DR.T
        router.bias_R[: len(chosen)] = -bias_R[0]


def choose_routes(loss_MR: Tensor, predicted_MR: Tensor, first: int, number: int) -> list[int]:
    """Choose, greedily, the routes with which tokens that take the lowest prediction have the lowest mean loss.

    Starts with `first` and adds up to `number` routes in all, one at a time, each the one that lowers the mean loss
    the most; ends early when none does.

    Args:
        loss_MR: what is scored; `predicted_MR`: what decides, in the same units.

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


def cross_fitted(states_MD: Tensor, loss_MR: Tensor, fold_M: Tensor) -> tuple[float, Tensor]:
    """Predict each fold from the others; return the penalty of the lowest squared error, and its predictions [M, R]."""
    predicted_PMR = loss_MR.new_empty(len(_PENALTIES), *loss_MR.shape)
    ones_M1 = states_MD.new_ones(len(states_MD), 1)
    for fold in fold_M.unique():
        held_M = fold_M == fold
        fitted_PFR = ridge(states_MD[~held_M], loss_MR[~held_M], _PENALTIES)
        predicted_PMR[:, held_M] = torch.cat([states_MD, ones_M1], dim=1)[held_M] @ fitted_PFR
    best = int((predicted_PMR - loss_MR).square().mean((1, 2)).argmin())
    return _PENALTIES[best], predicted_PMR[best]


def ridge(states_MD: Tensor, loss_MR: Tensor, penalties: Sequence[float]) -> Tensor:
    """Weights and, in the last row, intercepts [P, F, R] of the ridge regressions with these penalties.

    A penalty is relative to the mean variance of a feature times the number of tokens; intercepts are free.
    """
    mean_D, mean_R = states_MD.mean(0), loss_MR.mean(0)
    centred_MD = (states_MD - mean_D).double()
    values_D, vectors_DD = torch.linalg.eigh(centred_MD.T @ centred_MD)
    aimed_DR = vectors_DD.T @ (centred_MD.T @ (loss_MR - mean_R).double())
    fitted = []
    for penalty in penalties:
        weight_DR = vectors_DD @ (aimed_DR / (values_D + penalty * values_D.mean())[:, None])
        fitted.append(torch.cat([weight_DR, (mean_R - mean_D.double() @ weight_DR)[None]]))
    return torch.stack(fitted).to(loss_MR.dtype)


@dataclass(frozen=True)
class _Candidates:
    """Routes that may enter the codebook.

    Attributes:
        losses_WNR: less their mean over the candidates, nats.
        static: index of the route with k big layers of lowest mean loss.
        price: by how many nats one more big layer lowers the loss of the best single route.
    """

    routes_RL: Tensor
    big_R: Tensor
    losses_WNR: Tensor
    static: int
    price: float

    @property
    def static_L(self) -> Tensor:
        """The route itself."""
        return self.routes_RL[self.static]


def _candidates(
    labels: Labels, big_layers: int, decide_at: int, text_weight: float, router: CodebookRouter
) -> _Candidates:
    """Collect what the labels offer around the budget."""
    device = router.routes_RL.device
    indices = labels.with_big(big_layers - 1, big_layers + 1)
    routes_RL = labels.space.decode(labels.route_ids_R[indices])
    big_R = (routes_RL == Branch.BIG).sum(-1)
    losses_WNR = labels.losses(indices, text_weight)
    mean_R = losses_WNR.mean((0, 1))
    static = int(mean_R.masked_fill(big_R != big_layers, torch.inf).argmin())
    alike_R = (routes_RL[:, :decide_at] == routes_RL[static, :decide_at]).all(-1)
    lowest = [
        mean_R[big_R == big].min().item() for big in range(big_layers - 1, big_layers + 2) if (big_R == big).any()
    ]
    return _Candidates(
        routes_RL=routes_RL[alike_R].to(device),
        big_R=big_R[alike_R].to(device),
        losses_WNR=losses_WNR[..., alike_R],
        static=int(alike_R[:static].sum()),
        price=max(0.0, (lowest[0] - lowest[-1]) / max(1, len(lowest) - 1)),
    )


@torch.inference_mode()
def _states(model: DuoForCausalLM, token_ids_WT: Tensor, static_L: Tensor, decide_at: int) -> Tensor:
    """What the router sees of the labelled tokens at layer `decide_at`, [M, D]; float32."""
    seen: list[Tensor] = []

    def note(layer_idx: int, states_BTD: Tensor, memory: Any) -> tuple[Tensor, None]:
        if layer_idx == decide_at:
            seen.append(states_BTD.flatten(0, 1).float())
        return static_L[layer_idx].expand(states_BTD.shape[:2]), None

    for part_BT in token_ids_WT[:, :-1].to(model.device).split(_BATCH):
        model.model(input_ids=part_BT, policy=note, use_cache=False)
    return torch.cat(seen)
