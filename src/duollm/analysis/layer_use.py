"""How often each layer is big: over depth, and over the position in the window.

Shape letters: T tokens, D documents, P bins of positions, L layers, X draws of the bootstrap.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from duollm.analysis.statistics import Bootstrap, Floats, Integers
from duollm.models.branch import Branch
from duollm.routes.space import RouteSpace


@dataclass(frozen=True)
class LayerUse:
    """Counts of big choices and of tokens, per document and bin of positions."""

    big_DPL: Floats
    tokens_DP: Floats

    def by_layer(self, bootstrap: Bootstrap) -> Floats:
        """Return the share of tokens whose layer is big, draws [X, L]."""
        return bootstrap.ratio(self.big_DPL.sum(1), self.tokens_DP.sum(1))

    def by_position(self, bootstrap: Bootstrap) -> Floats:
        """Return the share of layers that are big, draws [X, P]."""
        return bootstrap.ratio(self.big_DPL.mean(2), self.tokens_DP)

    def by_layer_and_position(self) -> Floats:
        """Return the share of tokens whose layer is big, [L, P]."""
        return np.asarray((self.big_DPL.sum(0) / self.tokens_DP.sum(0)[:, None]).T)


def position_edges(position_T: Integers, most_bins: int = 8) -> Integers:
    """Return P + 1 edges that cut the observed positions into bins of (nearly) equal width.

    Bin p holds the positions edges[p] <= t < edges[p + 1]; the last edge is one past the last position.
    """
    first, last = int(position_T.min()), int(position_T.max())
    bins = min(most_bins, last - first + 1)
    return np.round(np.linspace(first, last + 1, bins + 1)).astype(np.int64)


def count_layer_use(
    space: RouteSpace, route_T: Integers, document_T: Integers, position_T: Integers, edges: Integers
) -> LayerUse:
    """Count big choices of routes [T] per document, bin of positions and layer."""
    shape = (int(document_T.max()) + 1, len(edges) - 1)
    bin_T = np.searchsorted(edges, position_T, side="right") - 1
    is_big_TL = (space.decode(route_T) == Branch.BIG).astype(np.float64)
    big_DPL, tokens_DP = np.zeros((*shape, space.num_layers)), np.zeros(shape)
    np.add.at(big_DPL, (document_T, bin_T), is_big_TL)
    np.add.at(tokens_DP, (document_T, bin_T), 1.0)
    return LayerUse(big_DPL, tokens_DP)


def pool_layer_use(domains: Sequence[LayerUse]) -> LayerUse:
    """Put the documents of all domains, counted on the same bins, side by side."""
    return LayerUse(
        np.concatenate([use.big_DPL for use in domains]), np.concatenate([use.tokens_DP for use in domains])
    )
