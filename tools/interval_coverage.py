"""How often 95 % intervals hold the truth: documents with planted effects, their sums bootstrapped, many times over.

    python tools/interval_coverage.py [--trials 2000]

Prints a Markdown table per quantity. A row is a kind of text and of document effect and a number of documents; a column
is a way to make an interval. The quantities are a gain (a ratio of sums over documents) and a share of the gap (a ratio
of two gains). `duollm` is its `Bootstrap` and `interval`; the other ways are written out here, with whole resamples.

Shape letters: D documents, T trials, X draws of the bootstrap.
"""

import argparse
from collections.abc import Callable, Sequence
from itertools import product
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from duollm.records.bootstrap import Bootstrap, Floats, interval

DOCUMENTS = (24, 48, 96)
WAYS = ("percentile", "duollm", "BCa", "jackknife t", "bootstrap t")
TOKEN_NOISE = 3.0
"""Standard deviation of a token's gain around its document's, whose own is 1."""
LARGER = 3.0
"""The gap, as a multiple of the mean gain."""
STUDENT = {24: 2.0687, 48: 2.0117, 96: 1.9853}
"""97.5 % points of Student's t with n - 1 degrees of freedom."""
SAMPLES = 1000
_NORMAL = NormalDist()

Found = dict[str, tuple[float, float]]
"""How often the truth is inside, and the median length, by way."""


def windows(generator: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    """One to three windows of 63 tokens, as in the quick study, whose documents are cut."""
    return generator.choice([63.0, 126.0, 189.0], p=[0.1, 0.1, 0.8], size=shape)


def whole_files(generator: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    """Sizes of files as they are: log-normal, standard deviation 1 (shipped prose: 0.7, code: 1.35)."""
    return np.maximum(20, np.round(np.exp(generator.normal(5.5, 1.0, shape))))


SIZES: dict[str, Callable[[np.random.Generator, tuple[int, ...]], Floats]] = {
    "windows": windows,
    "whole files": whole_files,
}
EFFECTS: dict[str, Callable[[np.random.Generator, tuple[int, ...]], Floats]] = {
    "normal": lambda generator, shape: generator.normal(size=shape),
    "skewed": lambda generator, shape: generator.exponential(size=shape) - 1,
    "heavy-tailed": lambda generator, shape: generator.standard_t(4, shape) / np.sqrt(2),
}
"""Effects of documents, mean 0 and variance 1. The oracle's gains on code are skewed about as much (1.9 against 2)."""


def coverage(size: str, effect: str, documents: int, trials: int, seed: int = 0) -> dict[str, Found]:
    """Return, for the gain and the share of the gap, what `judge` finds."""
    generator = np.random.default_rng(seed)
    shape = documents, trials
    tokens_DT = SIZES[size](generator, shape)

    def noise() -> Floats:
        return TOKEN_NOISE * generator.normal(size=shape) / np.sqrt(tokens_DT)

    effect_DT, other_DT = EFFECTS[effect](generator, shape), EFFECTS[effect](generator, shape)
    gain_DT = tokens_DT * (1 + effect_DT + noise())
    gap_DT = tokens_DT * (LARGER + (effect_DT + other_DT) / np.sqrt(2) + noise())
    # One set of resamples serves both quantities. It depends on the sizes, so each trial has its own.
    ours = [Bootstrap([tokens_DT[:, trial].astype(np.int64)], SAMPLES, trial) for trial in range(trials)]
    return {
        "gain": judge(ours, gain_DT, tokens_DT, 1.0, seed),
        "share of the gap": judge(ours, gain_DT, gap_DT, 1 / LARGER, seed),
    }


def judge(ours: Sequence[Bootstrap], gain_DT: Floats, of_DT: Floats, truth: float, seed: int) -> Found:
    """Return how often the interval of sum(gain) / sum(of) of each way holds the truth, and its median length."""
    documents = len(gain_DT)
    whole_XD = np.random.default_rng(seed).multinomial(documents, np.full(documents, 1 / documents), SAMPLES)
    draws_XT, value_T = (whole_XD @ gain_DT) / (whole_XD @ of_DT), gain_DT.sum(0) / of_DT.sum(0)
    without_DT = (gain_DT.sum(0) - gain_DT) / (of_DT.sum(0) - of_DT)
    away_DT = without_DT.mean(0) - without_DT
    half_T = STUDENT[documents] * np.sqrt((documents - 1) / documents * (away_DT**2).sum(0))
    shipped = [interval(one.ratio(gain_D, of_D)) for one, gain_D, of_D in zip(ours, gain_DT.T, of_DT.T, strict=True)]
    low_T, high_T = np.quantile(draws_XT, [0.025, 0.975], axis=0)
    ends = (
        (low_T, high_T),
        (np.array([one.low for one in shipped]), np.array([one.high for one in shipped])),
        bias_corrected(draws_XT, value_T, (away_DT**3).sum(0) / 6 / (away_DT**2).sum(0) ** 1.5),
        (value_T - half_T, value_T + half_T),
        studentised(whole_XD, draws_XT, gain_DT, of_DT),
    )
    return {
        way: (float(((low_T <= truth) & (truth <= high_T)).mean()), float(np.median(high_T - low_T)))
        for way, (low_T, high_T) in zip(WAYS, ends, strict=True)
    }


def bias_corrected(draws_XT: Floats, value_T: Floats, acceleration_T: Floats) -> tuple[Floats, Floats]:
    """Return Efron's bias-corrected and accelerated percentiles (1987)."""
    samples, trials = draws_XT.shape
    below_T = np.clip((draws_XT < value_T).mean(0), 1 / samples, 1 - 1 / samples)
    bias_T = np.array([_NORMAL.inv_cdf(below) for below in below_T])
    ordered_XT = np.sort(draws_XT, axis=0)
    ends = []
    for level in (0.025, 0.975):
        z_T = bias_T + _NORMAL.inv_cdf(level)
        level_T = np.array([_NORMAL.cdf(z) for z in bias_T + z_T / (1 - acceleration_T * z_T)])
        ends.append(ordered_XT[np.minimum((level_T * samples).astype(int), samples - 1), np.arange(trials)])
    return ends[0], ends[1]


def studentised(
    weights_XD: NDArray[np.int64], draws_XT: Floats, gain_DT: Floats, of_DT: Floats
) -> tuple[Floats, Floats]:
    """Return the bootstrap-t interval, with the linearised standard error of a ratio in every resample."""
    squares = weights_XD @ gain_DT**2 - 2 * draws_XT * (weights_XD @ (gain_DT * of_DT))
    squares += draws_XT**2 * (weights_XD @ of_DT**2)
    error_XT = np.sqrt(np.maximum(squares, 1e-12)) / (weights_XD @ of_DT)
    value_T = gain_DT.sum(0) / of_DT.sum(0)
    error_T = np.sqrt(((gain_DT - value_T * of_DT) ** 2).sum(0)) / of_DT.sum(0)
    low_T, high_T = np.quantile((draws_XT - value_T) / error_XT, [0.025, 0.975], axis=0)
    return value_T - high_T * error_T, value_T - low_T * error_T


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2000, help="simulated sets of documents per row")
    trials = parser.parse_args().trials
    tables: dict[str, list[str]] = {}
    for size, effect, documents in product(SIZES, EFFECTS, DOCUMENTS):
        for quantity, found in coverage(size, effect, documents, trials).items():
            cells = [f"{100 * covered:.1f} ({length:.2f})" for covered, length in found.values()]
            tables.setdefault(quantity, []).append(f"| {size} | {effect} | {documents} | {' | '.join(cells)} |")
    for quantity, rows in tables.items():
        print(f"\n{quantity}: coverage in % (median length)\n")
        print(f"| text | effects | documents | {' | '.join(WAYS)} |\n|---|---|---|{'---|' * len(WAYS)}")
        print("\n".join(rows))


if __name__ == "__main__":
    main()
