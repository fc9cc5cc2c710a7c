"""Turns predicted gains into routes: takes layers in the order of their gains, up to a price or an exact number.

Shape letters: W windows, B windows per forward, T tokens, L layers, C branches to choose from. A dot stands for any
leading dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from duollm.ceiling.predictor import GainPredictor, all_big_states
from duollm.models.branch import Branch
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.records.keys import SHUFFLED
from duollm.routes.space import RouteSpace

_TIE = 1e-4  # far below what a gain (nats x 100) can be told from, far above the rounding of float32
_BATCH = 16

Margins = dict[tuple[str, int], tuple[Tensor, Tensor]]
"""By predictor and big layers: the margin of big and the other branch, [W, T, L] each."""


@dataclass(frozen=True)
class CeilingPolicy:
    """One way from predicted gains to routes.

    Attributes:
        predictor: name of the predictor.
        depth: the last layer whose states the predictor sees.
        spend: "average" (big where the gain exceeds `price`) or "exact" (the `big_layers` with the largest gains).
        price: price of big in the predictor's units; None with exact spending.
        validation_nll: nats per token; None if it was not needed.
        chosen: whether no other depth had a lower `validation_nll` at this budget, spent this way.
    """

    predictor: str
    depth: int
    spend: str
    big_layers: int
    price: float | None
    validation_nll: float | None = None
    chosen: bool = False

    @property
    def column(self) -> str:
        """The ending of the names of its columns."""
        return f"{self.spend}_{self.predictor}_k{self.big_layers}"

    def routes(self, found: Margins) -> Tensor:
        """Return the routes of all tokens, [W, T, L]."""
        margin, otherwise = found[self.predictor, self.big_layers]
        if self.price is None:
            return exact_routes(margin, otherwise, self.big_layers)
        return priced_routes(margin, otherwise, self.price)


def choose(policies: Sequence[CeilingPolicy]) -> list[CeilingPolicy]:
    """Mark, for every budget and way of spending it, the depth with the lowest loss on validation text."""
    lowest: dict[tuple[str, int], float] = {}
    for policy in policies:
        if policy.predictor != SHUFFLED and policy.validation_nll is not None:
            key = policy.spend, policy.big_layers
            lowest[key] = min(lowest.get(key, float("inf")), policy.validation_nll)
    return [
        replace(
            policy,
            chosen=policy.predictor != SHUFFLED and policy.validation_nll == lowest[policy.spend, policy.big_layers],
        )
        for policy in policies
    ]


@torch.inference_mode()
def predicted_margins(
    model: DuoForCausalLM,
    predictors: nn.ModuleDict,
    big_layers: Sequence[int],
    space: RouteSpace,
    token_ids_WT: Tensor,
) -> Margins:
    """Predict by how much big beats the other branches, for every budget."""
    parts: dict[tuple[str, int], list[tuple[Tensor, Tensor]]] = {}
    for batch_BT in token_ids_WT.split(_BATCH):
        states_BTF = all_big_states(model, batch_BT)
        nowhere_BTL = torch.zeros(*batch_BT.shape, space.num_layers, device=batch_BT.device)
        for name, predictor in cast(dict[str, GainPredictor], predictors).items():
            from_states_BTLC = predictor.from_states(states_BTF)
            for k in big_layers:
                share_BT = torch.full(batch_BT.shape, k / space.num_layers, device=batch_BT.device)
                gains_BTLC = from_states_BTLC + predictor.from_told(share_BT, nowhere_BTL)
                found = margins(gains_BTLC, predictor.interactions(), space.branches)
                parts.setdefault((name, k), []).append(found)
    return {key: (torch.cat([m for m, _ in each]), torch.cat([o for _, o in each])) for key, each in parts.items()}


def margins(gains: Tensor, interactions: Tensor, branches: Sequence[Branch]) -> tuple[Tensor, Tensor]:
    """Make layers big one after another, the largest gain first, and return what each gained in its turn.

    A gain is the mean of those predicted with and without big at the layer itself (the slopes at both ends of the
    step). A turn that gains more than the one before counts as gaining as much, so taking layers down to any margin
    takes the first turns.

    Args:
        gains: predicted where the token takes big nowhere, [., L, C].
        interactions: [L, L, C], see `GainPredictor.interactions`.

    Returns:
        by how much big beat the best other branch, strictly falling in the order of the turns; and which branch that
        is where nothing is big; both [., L].
    """
    gains = gains + interactions.diagonal().T / 2
    otherwise = torch.tensor(branches, device=gains.device)[gains[..., :-1].argmax(-1)]
    margin = torch.full_like(gains[..., 0], -torch.inf)
    least = torch.full_like(margin[..., :1], torch.inf)
    taken = torch.zeros_like(margin, dtype=torch.bool)
    for _ in range(margin.shape[-1]):
        beats = (gains[..., -1] - gains[..., :-1].amax(-1)).masked_fill(taken, -torch.inf)
        most, layer = beats.max(-1, keepdim=True)
        least = torch.minimum(least - _TIE, most)
        margin.scatter_(-1, layer, least)
        taken.scatter_(-1, layer, True)
        gains = gains + interactions[layer[..., 0]]
    return margin, otherwise


def exact_routes(margin: Tensor, otherwise: Tensor, big_layers: int) -> Tensor:
    """Return routes [., L] in which every token takes big in the `big_layers` layers with the largest gains."""
    most = margin.topk(big_layers, dim=-1).indices
    return otherwise.scatter(-1, most, int(Branch.BIG))


def priced_routes(margin: Tensor, otherwise: Tensor, price: float | Tensor) -> Tensor:
    """Return routes [., L] in which a layer is big where its gain exceeds the price."""
    return torch.where(margin > price, int(Branch.BIG), otherwise)


def price_for(margin: Tensor, big_layers: int) -> float:
    """Return the price at which `big_layers` layers are big on average over tokens."""
    spent = round(margin.numel() * big_layers / margin.shape[-1])
    descending = margin.flatten().sort(descending=True).values
    return float("-inf") if spent == len(descending) else descending[spent].item()
