"""The predictable ceiling: routes from an offline prediction of what each branch gains (docs/concepts.md).

The predictor sees the hidden states of a pass in which all layers are big, at layers 0 .. depth, and decides for all
layers at once, those before `depth` too. So no router can follow it, but neither does it see a label.

Shape letters: B batch, T tokens, L layers, C branches to choose from, D hidden, F = (depth + 1) * D features, W inner
width. A dot stands for any leading dimensions.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from duollm.models.branch import Branch
from duollm.models.configuration_duo import DuoConfig
from duollm.models.dispatch import Dispatch
from duollm.models.modeling_duo import DuoForCausalLM

_TOLD = 5.0


class GainPredictor(nn.Module):
    """A linear map, and a bottleneck beside it (F -> W -> L x C, GELU), from hidden states to gains.

    Both are also told the share of big layers among which a gain is to count: what a big layer adds depends on how many
    others there are.

    Args:
        branches: to choose from, ascending; big is the last.
        depth: the last layer whose states are seen.
        width: W.
    """

    def __init__(self, config: DuoConfig, branches: Sequence[Branch], depth: int, width: int) -> None:
        super().__init__()
        self.depth, self.shape_LC = depth, (config.num_hidden_layers, len(branches))
        self.features, gains = (depth + 1) * config.hidden_size, config.num_hidden_layers * len(branches)
        self.linear = nn.Linear(self.features + 3, gains, bias=False)
        self.inner = nn.Linear(self.features + 3, width, bias=False)
        self.outer = nn.Linear(width, gains, bias=False)
        nn.init.normal_(self.inner.weight)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.outer.weight)

    def forward(self, states: Tensor, share: Tensor) -> Tensor:
        """Return the predicted gains [., L, C], float32, in the units that it was trained on.

        Args:
            states: [., F] as `all_big_states` returns them; more layers than are seen do no harm.
            share: of big layers, [.].
        """
        # Weights are of size 1 whatever the width, so one learning rate suits all depths. What is told is larger than a
        # feature, for the mean gains of the layers have to be learnt in few steps.
        told = torch.stack([torch.ones_like(share), share, share.square()], dim=-1)
        seen = states[..., : self.features] * self.features**-0.5
        hidden = nn.functional.gelu(self.inner(torch.cat([seen, told], dim=-1)))
        gains = self.linear(torch.cat([seen, _TOLD * told], dim=-1)) + self.outer(hidden * hidden.shape[-1] ** -0.5)
        return gains.float().unflatten(-1, self.shape_LC)


@torch.no_grad()
def all_big_states(model: DuoForCausalLM, batch_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Return what routers see at every layer when all layers are big, side by side, [B, T, L * D].

    And what the head then sees, [B, T, D].
    """
    states_LBTD: list[Tensor] = []

    def note(layer_idx: int, states_BTD: Tensor, memory: Any) -> tuple[Dispatch, Any]:
        states_LBTD.append(states_BTD)
        return Dispatch.uniform(Branch.BIG, batch_BT.numel()), None

    last_BTD = model.model(input_ids=batch_BT, policy=note, use_cache=False).last_hidden_state
    return torch.cat(states_LBTD, dim=-1), last_BTD


def margins(gains: Tensor, branches: Sequence[Branch]) -> tuple[Tensor, Tensor]:
    """Return by how much big beats the best other branch, and which that is, both [., L]."""
    best, which = gains[..., :-1].max(-1)
    return gains[..., -1] - best, torch.tensor(branches, device=gains.device)[which]


def exact_routes(margin: Tensor, otherwise: Tensor, big_layers: int) -> Tensor:
    """Make big the `big_layers` layers of every token that gain most by it; routes [., L]."""
    most = margin.topk(big_layers, dim=-1).indices
    return otherwise.scatter(-1, most, int(Branch.BIG))


def priced_routes(margin: Tensor, otherwise: Tensor, price: float) -> Tensor:
    """Make a layer big where that gains more than the price; routes [., L]."""
    return torch.where(margin > price, int(Branch.BIG), otherwise)


def price_for(margin: Tensor, big_layers: int) -> float:
    """Return the price at which `big_layers` layers are big on average over tokens."""
    spent = round(margin.numel() * big_layers / margin.shape[-1])
    descending = margin.flatten().sort(descending=True).values
    return float("-inf") if spent == len(descending) else descending[spent].item()
