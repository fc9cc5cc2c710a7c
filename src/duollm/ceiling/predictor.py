"""The predictable ceiling: routes from an offline prediction of what each branch gains (docs/concepts.md).

The predictor sees the hidden states of a pass in which all layers are big, at layers 0 .. depth, and decides for all
layers at once, those before `depth` too. So no router can follow it, but neither does it see a label.

Shape letters: B batch, T tokens, L layers, C branches to choose from, D hidden, F = (depth + 1) * D features, W inner
width. A dot stands for any leading dimensions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from duollm.models.branch import Branch
from duollm.models.configuration_duo import DuoConfig
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.routers.base import Listener

_TOLD = 5.0
_TIE = 1e-4  # far below what a gain (nats x 100) can be told from, far above the rounding of float32


class GainPredictor(nn.Module):
    """A linear map, and a bottleneck beside it (F -> W -> L x C, GELU), from hidden states to gains.

    A linear map of its own is told in which layers the token itself takes big, and which share the others take: layers
    stand in for each other, so what a big layer adds depends on what else is big.

    Args:
        branches: to choose from, ascending; big is the last.
        depth: the last layer whose states are seen.
        width: W.
    """

    def __init__(self, config: DuoConfig, branches: Sequence[Branch], depth: int, width: int) -> None:
        super().__init__()
        layers = config.num_hidden_layers
        self.depth, self.shape_LC = depth, (layers, len(branches))
        self.features, gains = (depth + 1) * config.hidden_size, layers * len(branches)
        self.told = nn.Linear(2 + layers, gains, bias=False)
        self.linear = nn.Linear(self.features, gains, bias=False)
        self.inner = nn.Linear(self.features, width)
        self.outer = nn.Linear(width, gains, bias=False)
        nn.init.normal_(self.inner.weight)
        for zero in (self.told.weight, self.linear.weight, self.inner.bias, self.outer.weight):
            nn.init.zeros_(zero)

    def forward(self, states: Tensor, share: Tensor, big: Tensor) -> Tensor:
        """Return the predicted gains [., L, C], float32, in the units that it was trained on.

        Args:
            states: [., F] as `all_big_states` returns them; more layers than are seen do no harm.
            share: of big layers among the other tokens, [.].
            big: 1 where the token itself takes big, else 0, [., L].
        """
        return self.from_states(states) + self.from_told(share, big)

    def from_states(self, states: Tensor) -> Tensor:
        """The part of the gains that the states decide, [., L, C]."""
        # Weights are of size 1 whatever the width, so one learning rate suits all depths.
        seen = states[..., : self.features] * self.features**-0.5
        hidden = nn.functional.gelu(self.inner(seen))
        gains = self.linear(seen) + self.outer(hidden * hidden.shape[-1] ** -0.5)
        return gains.float().unflatten(-1, self.shape_LC)

    def from_told(self, share: Tensor, big: Tensor) -> Tensor:
        """The part of the gains that is known without the states, [., L, C]."""
        # Larger than a feature, for what holds for all tokens has to be learnt in few steps.
        told = _TOLD * torch.cat([torch.ones_like(share)[..., None], share[..., None], big], dim=-1)
        return self.told(told).float().unflatten(-1, self.shape_LC)

    def interactions(self) -> Tensor:
        """By how much big at one layer (first dimension) changes the gains at another, [L, L, C]."""
        return _TOLD * self.told.weight[:, 2:].T.unflatten(-1, self.shape_LC)


@torch.no_grad()
def all_big_states(model: DuoForCausalLM, batch_BT: Tensor) -> Tensor:
    """Return what routers see at every layer when all layers are big, side by side, [B, T, L * D]."""
    seen = Listener(torch.full((model.config.num_hidden_layers,), int(Branch.BIG)))
    model.model(input_ids=batch_BT, policy=seen, use_cache=False)
    return torch.cat(seen.states_LBTD, dim=-1)


def margins(gains: Tensor, interactions: Tensor, branches: Sequence[Branch]) -> tuple[Tensor, Tensor]:
    """Make layers big one after another, the one that gains most first, and return what each gained in its turn.

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
    """Make big the `big_layers` layers of every token that gain most by it; routes [., L]."""
    most = margin.topk(big_layers, dim=-1).indices
    return otherwise.scatter(-1, most, int(Branch.BIG))


def priced_routes(margin: Tensor, otherwise: Tensor, price: float | Tensor) -> Tensor:
    """Make a layer big where that gains more than the price; routes [., L]."""
    return torch.where(margin > price, int(Branch.BIG), otherwise)


def price_for(margin: Tensor, big_layers: int) -> float:
    """Return the price at which `big_layers` layers are big on average over tokens."""
    spent = round(margin.numel() * big_layers / margin.shape[-1])
    descending = margin.flatten().sort(descending=True).values
    return float("-inf") if spent == len(descending) else descending[spent].item()
