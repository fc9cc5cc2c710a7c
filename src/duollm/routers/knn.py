"""A k-nearest-neighbour router (Li, "Rethinking predictive modeling for LLM routing", arXiv 2505.12601).

It keeps the states of labelled training tokens. A token's predicted loss under a route is the mean loss of its nearest
neighbours among them.

Shape letters: B batch, T tokens, M labelled tokens, D hidden, R routes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag, normalize

from duollm.config import LARGEST_CODEBOOK, RouterConfig
from duollm.models.branch import Branch
from duollm.models.configuration_duo import DuoConfig
from duollm.routers.codebook import RouteChooser

_UNTRAINED = 64


class KnnRouter(RouteChooser):
    """Predicts the losses of routes as the mean over the tokens of most similar state, by the cosine.

    Attributes:
        keys_MD: the states of the labelled tokens, of length 1.
        losses_MR: their losses under the routes of the codebook, nats.
        neighbours: how many tokens are averaged.
    """

    settings = (*RouteChooser.settings, "neighbours")
    saved = (*RouteChooser.saved, "neighbours")

    def __init__(self, config: DuoConfig, branches: Sequence[Branch]) -> None:
        super().__init__(config, branches)
        self.neighbours = 1
        self._make_room(_UNTRAINED)

    def _make_room(self, tokens: int) -> None:
        self.keys_MD = nn.Parameter(self.bias_R.new_zeros(tokens, self.hidden_size))
        self.losses_MR = nn.Parameter(self.bias_R.new_zeros(tokens, LARGEST_CODEBOOK))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Make room for as many tokens as were saved, then load."""
        self._make_room(len(state_dict[f"{prefix}keys_MD"]))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def lowered(self, states_BTD: Tensor) -> Tensor:
        """Return the mean loss of the nearest tokens, negative, [B, T, R], float32."""
        return -nearest_mean(states_BTD, self.keys_MD, self.losses_MR, self.neighbours)

    def cross_fit(self, states_MD: Tensor, loss_MR: Tensor, fold_M: Tensor, config: RouterConfig) -> Tensor:
        """Predict each fold from neighbours in the others, [M, R]."""
        self.neighbours, predicted_MR = config.neighbours, torch.empty_like(loss_MR)
        keys_MD = normalize(states_MD, dim=-1)
        for fold in fold_M.unique():
            held_M = fold_M == fold
            predicted_MR[held_M] = nearest_mean(
                states_MD[held_M], keys_MD[~held_M], loss_MR[~held_M], config.neighbours
            )
        return predicted_MR

    def keep(self, states_MD: Tensor, loss_MR: Tensor) -> None:
        """Keep the labelled tokens."""
        self._make_room(len(states_MD))
        self.keys_MD.copy_(normalize(states_MD, dim=-1))
        self.losses_MR[:, : loss_MR.shape[1]] = loss_MR
        self.bias_R[: loss_MR.shape[1]] = 0

    def flops_per_token(self) -> int:
        """Count a product with every key, at one layer, and the mean over the neighbours."""
        routes = int(self.bias_R.isfinite().sum())
        return 2 * self.keys_MD.numel() + min(self.neighbours, len(self.keys_MD)) * routes


def nearest_mean(states: Tensor, keys_MD: Tensor, losses_MR: Tensor, neighbours: int) -> Tensor:
    """Return the mean losses [., R] of the keys most similar to each state [., D]; of all keys if they are fewer."""
    similar = normalize(states.to(keys_MD.dtype), dim=-1) @ keys_MD.T
    nearest = similar.topk(min(neighbours, len(keys_MD)), dim=-1).indices
    return embedding_bag(nearest.flatten(0, -2), losses_MR, mode="mean").view(*states.shape[:-1], -1)
