"""Choices of one layer, sorted by branch, so that each branch runs one dense product.

Shape letters: B batch, T tokens, N = B * T, D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .branch import BRANCHES, Branch


@dataclass(frozen=True)
class Dispatch:
    """The tokens of one layer grouped by branch.

    Attributes:
        counts: numbers of tokens that take skip, small and big, as Python integers, so that shapes are known without
            asking the device.
        order_N: token indices sorted by branch; None when all tokens take the same branch.
        place_N: the inverse permutation, where each token stands in `order_N`.
        given_N: the choice by which the tokens were grouped, if it is known.
    """

    counts: tuple[int, int, int]
    order_N: Tensor | None = None
    place_N: Tensor | None = None
    given_N: Tensor | None = field(default=None, compare=False, repr=False)

    @classmethod
    def uniform(cls, branch: Branch, tokens: int) -> "Dispatch":
        """Return a dispatch in which all `tokens` tokens take `branch`."""
        skip, small, big = (tokens if branch == each else 0 for each in BRANCHES)
        return cls((skip, small, big))

    @classmethod
    def from_choice(cls, choice_BT: Tensor, counts: Sequence[int] | None = None) -> "Dispatch":
        """Group tokens by their choice, integers [B, T], values of `Branch`.

        If `counts` are not given, the device is asked for them.
        """
        choice_N = choice_BT.reshape(-1)
        if counts is None and choice_N.numel() == 1:  # decoding one sequence
            taken = int(choice_N)
            counts = [int(branch == taken) for branch in BRANCHES]
        skip, small, big = torch.bincount(choice_N, minlength=len(Branch)).tolist() if counts is None else counts
        if choice_N.numel() in (skip, small, big):
            return cls((skip, small, big), given_N=choice_N)
        return cls.from_order((skip, small, big), torch.argsort(choice_N, stable=True), choice_N)

    @classmethod
    def from_order(cls, counts: tuple[int, int, int], order_N: Tensor, given_N: Tensor | None = None) -> "Dispatch":
        """Return a dispatch: the first counts[0] tokens of `order_N` skip, the next counts[1] go small, others big."""
        place_N = torch.empty_like(order_N)
        place_N[order_N] = torch.arange(order_N.numel(), device=order_N.device)
        return cls(counts, order_N, place_N, given_N)

    def choice_N(self, device: torch.device | None = None) -> Tensor:
        """Return the choice of every token, integers [N], on `device` if all take the same branch."""
        if self.given_N is not None:
            return self.given_N
        if self.branch is not None:
            return torch.full((sum(self.counts),), self.branch.value, device=device)
        assert self.place_N is not None
        skip, small, _ = self.counts
        return (self.place_N >= skip).long() + (self.place_N >= skip + small)

    @property
    def branch(self) -> Branch | None:
        """The branch that all tokens take, or None if they differ."""
        return None if self.order_N is not None else Branch(self.counts.index(max(self.counts)))

    def group(self, states_ND: Tensor) -> tuple[Tensor, ...]:
        """Split states [N, D] into those of skip, small and big, in that order."""
        if self.order_N is not None:
            states_ND = _permute(states_ND, self.order_N, self.place_N)
        return states_ND.split(self.counts)

    def ungroup(self, groups: list[Tensor]) -> Tensor:
        """Put the groups' rows back in the order of the tokens, [N, D]."""
        states_ND = torch.cat(groups)
        return states_ND if self.order_N is None else _permute(states_ND, self.place_N, self.order_N)


def _permute(states_ND: Tensor, order_N: Tensor | None, inverse_N: Tensor | None) -> Tensor:
    assert order_N is not None  # asked for tokens that take several branches
    if torch.is_grad_enabled():
        return _Permute.apply(states_ND, order_N, inverse_N)
    return states_ND.index_select(0, order_N)


class _Permute(torch.autograd.Function):
    """Reorder rows. Autograd would scatter-add the gradient; a permutation only needs its inverse.

    In the form that torch.func's transforms take too.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(states_ND: Tensor, order_N: Tensor, inverse_N: Tensor) -> Tensor:
        return states_ND.index_select(0, order_N)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, gradient_ND: Tensor) -> tuple[Tensor, None, None]:
        (inverse_N,) = ctx.saved_tensors
        return gradient_ND.index_select(0, inverse_N), None, None
