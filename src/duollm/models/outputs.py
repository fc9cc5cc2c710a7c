"""What a forward pass of the duo returns.

Shape letters: B batch, T tokens, L layers, C branches (skip, small, big).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .compat import BothCacheNames


@dataclass
class DuoModelOutput(BothCacheNames, BaseModelOutputWithPast):
    """`choices`: per layer what the policy chose, branches [B, T] or weights of the branches [B, T, C]."""

    choices: tuple[Tensor, ...] | None = None


@dataclass
class DuoCausalLMOutput(BothCacheNames, CausalLMOutputWithPast):
    """`choices`: per layer what the policy chose, branches [B, T] or weights of the branches [B, T, C]."""

    choices: tuple[Tensor, ...] | None = None

    @property
    def routes(self) -> Tensor:
        """The routes taken, integers [B, T, L], values of `Branch`; soft choices count as their largest weight."""
        assert self.choices is not None
        hard = [choice.argmax(-1) if choice.is_floating_point() else choice for choice in self.choices]
        return torch.stack(hard, dim=-1)
