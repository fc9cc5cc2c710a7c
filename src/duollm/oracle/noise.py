"""Selection noise: what a peek at the label buys, measured with labels that nobody could predict.

The oracle picks the best of thousands of routes with the label in hand, so part of its gain is luck.
To measure it, draw two labels y' and y'' from a reference prediction, pick with y', score on y''
(docs/oracle.md, "Selection noise").

Shape letters: B sequences, T tokens, N = B * T, S pairs of labels, V vocabulary.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from duollm.models.modeling_duo import DuoForCausalLM
from duollm.routes.space import RouteSpace

_MEAN_ROUTES = 64


@dataclass(frozen=True)
class DrawnLabels:
    """Labels y' and y'', each [S, N], and how surprising they happened to be.

    Attributes:
        excess_2SN: nll of y' and of y'' under the reference prediction, less its expectation. Its mean is
            zero, and it goes with the losses of the labels under any route, so subtracting it from those
            leaves their expectation and removes most of the variance (a control variate).
    """

    first_SN: Tensor
    second_SN: Tensor
    excess_2SN: Tensor


@dataclass(frozen=True)
class Resampling:
    """How labels are drawn.

    Attributes:
        pairs: S, pairs (y', y'') per position.
        source: the reference prediction: "all-big", "mean" over 64 random routes, or probabilities
            [B, T, V] of another model.
    """

    pairs: int = 1
    source: Literal["all-big", "mean"] | Tensor = "all-big"

    def draw(
        self, model: DuoForCausalLM, input_ids: Tensor, space: RouteSpace, generator: torch.Generator
    ) -> "DrawnLabels":
        """Draw labels for the predictions at `input_ids` [B, T]."""
        probabilities_NV = self._probabilities(model, input_ids, space, generator)
        drawn_NS = torch.multinomial(probabilities_NV, 2 * self.pairs, replacement=True, generator=generator)
        entropy_N = -torch.xlogy(probabilities_NV, probabilities_NV).sum(-1)
        excess_NS = -probabilities_NV.gather(1, drawn_NS).log() - entropy_N[:, None]
        first_SN, second_SN = drawn_NS.T.split(self.pairs)
        return DrawnLabels(first_SN, second_SN, excess_NS.T.view(2, self.pairs, -1))

    def _probabilities(
        self, model: DuoForCausalLM, input_ids: Tensor, space: RouteSpace, generator: torch.Generator
    ) -> Tensor:
        if isinstance(self.source, Tensor):
            expected = (*input_ids.shape, model.config.vocab_size)
            if tuple(self.source.shape) != expected:
                raise ValueError(f"probabilities must have shape {list(expected)}, got {list(self.source.shape)}")
            return self.source.flatten(0, 1)
        if self.source == "all-big":
            return model(input_ids=input_ids, use_cache=False).logits.float().softmax(-1).flatten(0, 1)
        if self.source != "mean":
            raise ValueError(f"source must be 'all-big', 'mean' or probabilities, got {self.source!r}")
        return mean_prediction(model, input_ids, space, generator).flatten(0, 1)


def mean_prediction(
    model: DuoForCausalLM, input_ids: Tensor, space: RouteSpace, generator: torch.Generator, routes: int = _MEAN_ROUTES
) -> Tensor:
    """The mean of the predictions of random routes, each taken by all tokens: probabilities [B, T, V]."""
    ids = torch.randint(space.size, (routes,), generator=generator, device=generator.device)
    total = torch.zeros(*input_ids.shape, model.config.vocab_size, device=input_ids.device)
    for route in space.decode(ids):
        total += model(input_ids=input_ids, routes=route, use_cache=False).logits.float().softmax(-1)
    return total / routes
