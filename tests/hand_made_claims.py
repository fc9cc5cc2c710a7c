"""Claims of conditions that hold below 0, for tests of how claims are put together."""

import numpy as np

from duollm.analysis.verdicts import condition, decide


def claim(name, *conditions, domain="prose"):
    return decide(name, domain, "statement", "found.", *conditions)


def low(quantity, value=-1.0, half=0.5, possible=None):
    draws_X = None if value is None else np.concatenate([[value], np.linspace(value - half, value + half, 101)])
    return condition(quantity, draws_X, below=0, possible=possible)
