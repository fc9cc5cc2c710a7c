"""The predictable ceiling: routes from an offline prediction of what each branch gains (docs/concepts.md).

The predictor sees the hidden states of a pass in which all layers are big, at layers 0 .. depth. It decides for all
layers at once, also for those before `depth`. So no router can do the same. It never sees a label.

Shape letters: B batch, T tokens, L layers, C branches to choose from, D hidden, F = (depth + 1) * D features, W inner
width. A dot stands for any leading dimensions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from duollm.config import CeilingConfig
from duollm.models.branch import Branch
from duollm.models.configuration_duo import DuoConfig
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.records.keys import SHUFFLED
from duollm.routers.base import Listener

_TOLD = 5.0


class GainPredictor(nn.Module):
    """A linear map, and a bottleneck beside it (F -> W -> L x C, GELU), from hidden states to gains.

    A second linear map gets as inputs in which layers the token itself takes big, and the share of big of the other
    tokens. Layers stand in for each other, so what a big layer adds depends on which other layers are big.

    Args:
        branches: to choose from, ascending; big is the last.
        depth: the last layer whose states the predictor sees.
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
        """Return the predicted gains [., L, C], float32, in the units of the training.

        Args:
            states: [., F] as `all_big_states` returns them. States of further layers are ignored.
            share: share of big layers among the other tokens, [.].
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


def make_predictors(
    model: DuoForCausalLM, config: CeilingConfig, branches: Sequence[Branch], seed: int
) -> nn.ModuleDict:
    """Build an untrained predictor for every depth and the control.

    Raises:
        UserError: a depth that the model does not have.
    """
    depths = config.depths_in(model.config.num_hidden_layers)
    torch.manual_seed(seed)
    named = {f"l{depth}": depth for depth in depths} | {SHUFFLED: depths[-1]}
    return nn.ModuleDict(
        {name: GainPredictor(model.config, branches, depth, config.width) for name, depth in named.items()}
    )


@torch.no_grad()
def all_big_states(model: DuoForCausalLM, batch_BT: Tensor) -> Tensor:
    """Return what routers see at every layer when all layers are big, side by side, [B, T, L * D]."""
    seen = Listener(torch.full((model.config.num_hidden_layers,), int(Branch.BIG)))
    model.model(input_ids=batch_BT, policy=seen, use_cache=False)
    return torch.cat(seen.states_LBTD, dim=-1)
