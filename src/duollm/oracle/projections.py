"""Queries, keys and values of a layer for many prefixes at once, with few passes over the states.

Shape letters: P prefixes, B sequences, T tokens that are compared, N = B * T, H heads, G key/value heads, d head width,
D hidden, S tokens in a cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import linear

from duollm.models.attention import DuoAttention, Rotary
from duollm.models.ffn import is_plain, nobody_watches

Heads = tuple[Tensor, Tensor, Tensor]
"""Scaled queries [P, B, T, H, d], and keys and values [P, B, T, G, d]."""

_MOST_BYTES = 64 * 2**20
"""Of joined weights. A model that needs more spends its time in the products themselves."""


@dataclass(frozen=True)
class Projections:
    """Projects the states of some positions; by one product per layer where nobody would notice.

    A rotation turns the numbers i and i + d/2 of a head together. The joined weights put the two side by side, so that
    a pair is a complex number and rotating is one multiplication. Scores do not change, because the numbers of queries
    and keys are rearranged alike.

    Attributes:
        rotary: cosines and sines [B, T, d]; None without rotary positions.
        joined: per layer the weight [(H + 2G) * d, D] and bias; None where the layers' own modules must run.
        turns_BT1c: the rotation of each pair, complex [B, T, 1, d/2].
    """

    rotary: Rotary | None
    joined: list[tuple[Tensor, Tensor | None]] | None
    turns_BT1c: Tensor | None = None

    @classmethod
    def of(cls, layers: Sequence[DuoAttention], rotary: Rotary | None) -> Self:
        """Join the weights of all layers, if they are plain float32 on a CPU and their rotation is the usual one."""
        size = sum(each.weight.nbytes for layer in layers for each in _products(layer))
        watched = torch.is_autocast_enabled("cpu") or not nobody_watches()
        if size > _MOST_BYTES or watched or not all(map(_may_join, layers)):
            return cls(rotary, None)
        if rotary is None:
            return cls(None, [_join(layer, rotated=False) for layer in layers])
        (cos, cos_again), (sin, sin_again) = (each.chunk(2, dim=-1) for each in rotary)
        if not (cos.equal(cos_again) and sin.equal(sin_again) and cos.dtype == torch.float32):
            return cls(rotary, None)
        return cls(rotary, [_join(layer, rotated=True) for layer in layers], torch.complex(cos, sin)[:, :, None])

    def at(self, here: slice) -> Self:
        """Return the projections at some of the positions."""
        rotary = None if self.rotary is None else (self.rotary[0][:, here], self.rotary[1][:, here])
        turns_BT1c = None if self.turns_BT1c is None else self.turns_BT1c[:, here]
        return type(self)(rotary, self.joined, turns_BT1c)

    def __call__(self, attention: DuoAttention, states_PND: Tensor, tokens: int) -> Heads:
        """Project normalised states [P, B * T, D], T = `tokens`."""
        heads, groups, width = attention.config.attention_shape
        prefixes, rows, _ = states_PND.shape
        shape = (prefixes, rows // tokens, tokens, -1, width)
        if self.joined is None:
            rotary = self.rotary
            if rotary is not None and len(rotary[0]) > 1:
                rotary = (rotary[0].repeat(prefixes, 1, 1), rotary[1].repeat(prefixes, 1, 1))
            projected = attention.project(states_PND.reshape(-1, tokens, states_PND.shape[-1]), rotary)
            query, key, value = (each.transpose(1, 2).view(shape) for each in projected)
            return query * attention.scaling, key, value
        projected_PBThd = linear(states_PND, *self.joined[attention.layer_idx]).view(shape)
        if self.turns_BT1c is not None:
            pairs = torch.view_as_complex(projected_PBThd[..., : heads + groups, :].unflatten(-1, (-1, 2)))
            pairs.mul_(self.turns_BT1c)
        query, key, value = projected_PBThd.split((heads, groups, groups), dim=3)
        return query, key, value

    def as_projected(self, keys_BGSd: Tensor) -> Tensor:
        """Arrange keys that the model cached as `__call__` arranges its own."""
        return keys_BGSd if self.turns_BT1c is None else _paired(keys_BGSd)


def _products(layer: DuoAttention) -> list[torch.nn.Linear]:
    return [layer.q_proj, layer.k_proj, layer.v_proj]


def _may_join(layer: DuoAttention) -> bool:
    """Whether the weights of the three products say all about them."""
    plain = layer.q_norm is None and all(map(is_plain, _products(layer)))
    return plain and all(
        each.weight.dtype == torch.float32 and each.weight.device.type == "cpu" for each in _products(layer)
    )


def _join(layer: DuoAttention, rotated: bool) -> tuple[Tensor, Tensor | None]:
    """The joined weight and bias; the queries' are scaled."""
    weights = [each.weight for each in _products(layer)]
    biases = [each.bias for each in _products(layer) if each.bias is not None]
    return _joined(layer, weights, rotated), _joined(layer, biases, rotated) if biases else None


def _joined(layer: DuoAttention, parts: Sequence[Tensor], rotated: bool) -> Tensor:
    query, key, value = (each.unflatten(0, (-1, layer.head_dim)) for each in parts)
    if rotated:
        query, key = (_paired(each.movedim(1, -1)).movedim(-1, 1) for each in (query, key))
    return torch.cat([query * layer.scaling, key, value]).flatten(0, 1)


def _paired(numbers: Tensor) -> Tensor:
    """Put the numbers i and i + d/2 of the last axis side by side."""
    return numbers.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
