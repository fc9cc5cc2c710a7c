"""The bootstrap over documents: intervals for quantities that are made of sums over documents.

Tokens of one document are correlated, so documents are resampled, never tokens. All quantities are computed on the same
resamples, which makes differences between policies paired.

Shape letters: D documents, X draws (the data itself first, then the resamples), T tokens.
A trailing Q stands for any further dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Estimate:
    """A value from the data and the percentile interval around it."""

    value: float
    low: float
    high: float

    def __neg__(self) -> "Estimate":
        """Return the estimate of the negated quantity."""
        return Estimate(-self.value, -self.high, -self.low)


class Bootstrap:
    """Resamples of documents, drawn with replacement within each stratum (domain).

    `weights_XD[x, d]` is how often document d occurs in draw x. Draw 0 is the data themselves.
    """

    def __init__(self, documents: Sequence[int], samples: int, seed: int) -> None:
        """Draw `samples` resamples. `documents` is the number of documents in each stratum."""
        generator = np.random.default_rng(seed)
        counts = [generator.multinomial(size, np.full(size, 1 / size), size=samples) for size in documents]
        resamples_SD = np.concatenate(counts, axis=1)
        self.weights_XD: Floats = np.concatenate([np.ones((1, sum(documents))), resamples_SD])

    def ratio(self, totals_DQ: Floats, counts_DQ: Floats | Integers) -> Floats:
        """Return sum(totals) / sum(counts) over documents, for the data and every resample: [X, Q...].

        `counts` is [D], or has the shape of `totals`. A resample whose counts sum to 0 gives NaN.
        """
        numerator_XQ = np.tensordot(self.weights_XD, totals_DQ, axes=1)
        denominator_XQ = np.tensordot(self.weights_XD, counts_DQ.astype(np.float64), axes=1)
        missing = numerator_XQ.ndim - denominator_XQ.ndim
        denominator_XQ = denominator_XQ.reshape(denominator_XQ.shape + (1,) * missing)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(numerator_XQ / denominator_XQ, dtype=np.float64)


def interval(draws_X: Floats, level: float = 0.95) -> Estimate:
    """Return the value of the data (draw 0) with the percentile interval of the resamples."""
    outside = (1 - level) / 2
    low, high = np.nanquantile(draws_X[1:], [outside, 1 - outside])
    return Estimate(float(draws_X[0]), float(low), float(high))


def interval_if(draws_X: Floats | None) -> Estimate | None:
    """Return the `interval` of draws, or None if the quantity was not measured."""
    return None if draws_X is None else interval(draws_X)


def intervals(draws_XQ: Floats, level: float = 0.95) -> list[Estimate]:
    """Return `interval` of every column."""
    return [interval(draws_X, level) for draws_X in draws_XQ.T]


def sum_by_document(values_TQ: Floats, document_T: Integers, documents: int) -> Floats:
    """Sum values over the tokens of each document: [D, Q...]."""
    columns_TC = values_TQ.reshape(len(values_TQ), -1)
    totals_CD = [np.bincount(document_T, column_T, documents) for column_T in columns_TC.T]
    totals_DC: Floats = np.stack(totals_CD, axis=1).astype(np.float64)
    return totals_DC.reshape(documents, *values_TQ.shape[1:])


BOOTSTRAP_SAMPLES = 2000


def mean_draws(documents: Sequence[str] | NDArray[np.str_], nll_TP: Floats, seed: int = 0) -> Floats:
    """Return the mean nll of P policies on the same tokens, for the data and every resample: [X, P], nats.

    With a single document all resamples are NaN, because nothing is known about differences between documents.

    Args:
        documents: the document of each token, [T].
    """
    names, document_T = np.unique(np.asarray(documents), return_inverse=True)
    totals_DP = sum_by_document(nll_TP, document_T, len(names))
    means_XP = Bootstrap([len(names)], BOOTSTRAP_SAMPLES, seed).ratio(totals_DP, np.bincount(document_T))
    if len(names) == 1:
        means_XP[1:] = np.nan
    return means_XP
