"""The bootstrap over documents: intervals for quantities that are made of sums over documents, and their printing.

Tokens of one document are correlated, so documents are resampled, never tokens. All quantities are computed on the same
resamples, which makes differences between policies paired.

Plain percentile intervals of few documents are too short: they take the variance as known, and as smaller than it is.
So a resample has fewer documents than the data (see `Bootstrap`), which puts its percentiles as far apart as Student's
t asks. `tools/interval_coverage.py` measures what that is worth (docs/evaluation.md).

Shape letters: D documents, X draws (the data itself first, then the resamples), T tokens.
A trailing Q stands for any further dimensions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

BOOTSTRAP_SAMPLES = 2000
MINUS = "\N{MINUS SIGN}"
_STUDENT = (1.96**2 + 1) / 2
"""t / 1.96 is to first order sqrt(1 + this / degrees of freedom) (Abramowitz and Stegun, 26.7.5)."""


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

    `weights_XD[x, d]` is how much document d counts in draw x; a stratum counts as many as it has documents. Draw 0 is
    the data themselves.

    Of n documents a resample takes n (1 - 1/e) (1 - 2.42/f); that is n - 3.4 of n equal ones. e is the effective number
    of documents, (sum of sizes)^2 / sum of squared sizes (Kish, 1965); f is the sum of e - 1 over the strata. The first
    factor makes the variance unbiased, as n - 1 of n does (Rao and Wu, 1988). The second is to first order
    (1.96 / t)^2, where t is the 97.5 % point of Student's t with f degrees of freedom. Hesterberg (2015) gets the same
    lengths by wider percentiles. Numbers between two whole ones are met on average over the resamples.
    """

    def __init__(self, tokens: Sequence[Integers], samples: int, seed: int) -> None:
        """Draw `samples` resamples. `tokens` has the tokens of each document, [D], for each stratum."""
        generator = np.random.default_rng(seed)
        effective = [1 / np.square(tokens_D / tokens_D.sum()).sum() for tokens_D in tokens]
        freedom = sum(effective) - len(effective)
        kept = 1 - _STUDENT / max(freedom, _STUDENT)
        strata = []
        for size, documents in zip(map(len, tokens), effective, strict=True):
            wanted_S = size * (1 - 1 / documents) * kept + generator.random(samples)
            drawn_S = np.maximum(np.floor(wanted_S), 1).astype(np.int64)
            counts_SD = generator.multinomial(drawn_S, np.full(size, 1 / size))
            strata.append(counts_SD * (size / drawn_S)[:, None])
        resamples_SD = np.concatenate(strata, axis=1)
        self.weights_XD: Floats = np.concatenate([np.ones((1, resamples_SD.shape[1])), resamples_SD])

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


def stratified_draws(strata: Sequence[tuple[Sequence[str] | NDArray[np.str_], Floats]], seed: int) -> Floats:
    """Return means of P quantities over all rows, for the data and every resample of documents: [X, P].

    Args:
        strata: for each stratum (domain) the document of each row, and the quantities of each row, [rows, P].
    """
    sums_DP, rows_D = [], []
    for documents, values_TP in strata:
        names, document_T = np.unique(np.asarray(documents), return_inverse=True)
        sums_DP.append(sum_by_document(values_TP, document_T, len(names)))
        rows_D.append(np.bincount(document_T))
    return Bootstrap(rows_D, BOOTSTRAP_SAMPLES, seed).ratio(np.concatenate(sums_DP), np.concatenate(rows_D))


def mean_draws(documents: Sequence[str] | NDArray[np.str_], nll_TP: Floats, seed: int = 0) -> Floats:
    """Return the mean nll of P policies on the same tokens, for the data and every resample: [X, P], nats.

    With a single document all resamples are NaN, because nothing is known about differences between documents.

    Args:
        documents: the document of each token, [T].
    """
    means_XP = stratified_draws([(documents, nll_TP)], seed)
    if len(set(documents)) == 1:
        means_XP[1:] = np.nan
    return means_XP


def nats(value: float | None, decimals: int = 3) -> str:
    """Format a loss, a difference or a share."""
    return "\N{EN DASH}" if value is None else f"{value:.{decimals}f}".replace("-", MINUS)


def percent(value: float) -> str:
    """Format a share as a whole percentage."""
    return f"{value:.0%}".replace("-", MINUS)


def tenths(share: float) -> str:
    """Format a share as a percentage with one decimal."""
    return f"{share:.1%}".replace("-", MINUS)


def whole(value: float) -> str:
    """Format a count."""
    return f"{value:.0f}"


def brackets(measured: Estimate, form: Callable[[float], str] = nats) -> str:
    """Format the interval of an estimate."""
    return f"[{form(measured.low)}, {form(measured.high)}]"


def with_interval(measured: Estimate | None, form: Callable[[float], str] = nats) -> str:
    """Format an estimate and its interval, or say that it was not measured."""
    return "not measured" if measured is None else f"{form(measured.value)} {brackets(measured, form)}"
