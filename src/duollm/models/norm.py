"""The norms of the dense families."""

import torch
from torch import Tensor, nn

from .configuration_duo import DuoConfig


def make_norm(config: DuoConfig) -> nn.Module:
    """A norm over the hidden size, of the configured kind."""
    if config.norm == "layer":
        return nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps)
    return DuoRMSNorm(config.hidden_size, config.rms_norm_eps)


class DuoRMSNorm(nn.Module):
    """Root mean square normalisation (Zhang & Sennrich, 2019), computed in float32."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, states: Tensor) -> Tensor:
        """Normalise the last dimension."""
        weight, wanted = self.weight, compute_dtype(states)
        if states.dtype == weight.dtype:  # torch widens bf16 inside
            normed = nn.functional.rms_norm(states, weight.shape, weight, self.eps)
        else:
            normed = nn.functional.rms_norm(states.float(), weight.shape, weight.float(), self.eps)
        return normed if normed.dtype == wanted else normed.to(wanted)


def compute_dtype(states: Tensor) -> torch.dtype:
    """The type that matrix products will use: cast once here, not once per product under autocast."""
    device = states.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # autocast does not know the meta device
        return states.dtype
    return torch.get_autocast_dtype(device)
