"""Passages of text for the page: shaded by loss and difficulty, or where a router and the oracle differ.

Shape letters: T tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from duollm.analysis.layers import difficulty
from duollm.models.branch import Branch
from duollm.records.bootstrap import Floats
from duollm.records.keys import ALL_BIG, Key
from duollm.records.tokens import Tokens

_FULL_QUANTILE = 0.97
"""A shade is full at this quantile of its quantity, so that shades are comparable within a domain."""
_DIFFERING_LENGTH = 64


@dataclass(frozen=True)
class Token:
    """One token: what to print, two shades, and the numbers behind them.

    Attributes:
        left: shade of the loss, 0 .. 1, or of the spending, -1 .. 1.
        right: shade of the difficulty, or of the loss above the oracle's, 0 .. 1.
    """

    text: str
    left: float
    right: float
    numbers: str


@dataclass(frozen=True)
class Passage:
    """A stretch of one window, token by token, with the values at which its two shades are full."""

    document: str
    tokens: list[Token]
    left_full: float
    right_full: float


def passages(domain: Tokens, big_layers: int, count: int) -> list[Passage]:
    """Return the first window of the first `count` documents, shaded by loss and by the oracle's gain."""
    nll_small_T, gain_T = difficulty(domain, big_layers)
    nll_big_T = domain.policies[Key(ALL_BIG, domain.space.num_layers)].nll_T
    best_T = domain.oracle(big_layers).nll_T

    def numbers(t: int) -> str:
        small, best, gain, big = nll_small_T[t], best_T[t], gain_T[t], nll_big_T[t]
        return f"all small {small:.2f}, oracle {best:.2f}, gain {gain:.2f}, all big {big:.2f} nats"

    windows = [first_window(domain, document) for document in range(len(domain.documents[:count]))]
    return [_shaded(domain, rows, nll_small_T, np.maximum(0, gain_T), 0.0, numbers) for rows in windows]


def differing_passages(domain: Tokens, router: Key, count: int) -> list[Passage]:
    """Return the stretches on which a router loses most against the oracle of its budget, at most one per window.

    The left shade is the big layers that the router spends more (above 0) or less than the oracle. The right shade is
    nll(router) - nll(oracle).
    """
    ours, oracle = domain.policies[router], domain.oracle(router.big_layers)
    loss_T, routes_TL, best_TL = ours.nll_T - oracle.nll_T, ours.routes_TL, oracle.routes_TL
    more_T = (routes_TL == Branch.BIG).sum(1) - (best_TL == Branch.BIG).sum(1)
    same_T, layers = (routes_TL == best_TL).sum(1), domain.space.num_layers

    def numbers(t: int) -> str:
        return (
            f"router {ours.nll_T[t]:.2f}, oracle {oracle.nll_T[t]:.2f} nats; "
            f"{more_T[t]:+d} big layers; same branch in {same_T[t]} of {layers} layers"
        )

    return [_shaded(domain, rows, more_T, loss_T, 1.0, numbers) for rows in _worst_stretches(domain, loss_T, count)]


def _shaded(
    domain: Tokens, rows: Sequence[int], left_T: Any, right_T: Floats, least: float, numbers: Callable[[int], str]
) -> Passage:
    """Shade some of the tokens; the left shade is full at `least` or above."""
    left_full = max(least, float(np.quantile(np.abs(left_T), _FULL_QUANTILE)))
    right_full = float(np.quantile(np.abs(right_T), _FULL_QUANTILE))

    def shade(value: float, full: float) -> float:
        return round(float(np.clip(value / full, -1, 1)), 2) if full > 0 else 0.0

    tokens = [
        Token(visible(domain.text[t]), shade(left_T[t], left_full), max(0.0, shade(right_T[t], right_full)), numbers(t))
        for t in rows
    ]
    return Passage(domain.documents[domain.document_T[rows[0]]], tokens, left_full, right_full)


def _worst_stretches(domain: Tokens, loss_T: Floats, count: int) -> list[Sequence[int]]:
    """Return the rows of the stretch with the highest mean loss of each window, worst windows first."""
    window_T = np.stack([domain.document_T, domain.window_T], axis=1)
    _, owner_T = np.unique(window_T, axis=0, return_inverse=True)
    worst: list[tuple[float, list[int]]] = []
    for owner in range(int(owner_T.max()) + 1):
        rows = np.flatnonzero(owner_T == owner)
        length = min(_DIFFERING_LENGTH, len(rows))
        means = np.convolve(loss_T[rows], np.full(length, 1 / length), mode="valid")
        start = int(means.argmax())
        worst.append((float(means[start]), rows[start : start + length].tolist()))
    return [rows for _, rows in sorted(worst, key=lambda each: -each[0])[:count]]


def first_window(domain: Tokens, document: int) -> list[int]:
    """Return the rows of a document's first window, in order of position."""
    mine = np.flatnonzero(domain.document_T == document)
    first = domain.window_T[mine].min()
    return [int(t) for t in mine[domain.window_T[mine] == first]]


def visible(text: str) -> str:
    """Return a token's text with line ends, tabs, lone spaces and unprintable characters made visible.

    A line end keeps its effect after its mark.
    """
    if text and not text.strip(" "):
        return "·" * len(text)
    marked = text.replace("\r", "").replace("\t", "⇥")
    return "".join("↵\n" if c == "\n" else c if c.isprintable() else "�" for c in marked)


def one_line(text: str) -> str:
    """Return a token's visible text without line ends, spaces as dots: a label."""
    return visible(text).replace("\n", "").replace(" ", "·")
