"""Text as it is shown: tokens with visible white space, shaded by loss and by difficulty."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from duollm.analysis.difficulty import difficulty
from duollm.analysis.statistics import Floats
from duollm.analysis.tables import OracleTable

_SHADE_QUANTILE = 0.97


@dataclass(frozen=True)
class Token:
    """One token: what to print, two shades between 0 and 1, and the numbers behind them."""

    text: str
    loss_shade: float
    gain_shade: float
    numbers: str


@dataclass(frozen=True)
class Passage:
    """The first window of a document, token by token, with the nats at which the two shades are full."""

    document: str
    tokens: list[Token]
    loss_full: float
    gain_full: float


def passages(oracle: OracleTable, big_layers: int, count: int) -> list[Passage]:
    """Return the first window of the first `count` documents; shades are comparable within a domain."""
    gain_T = difficulty(oracle.nll_small_T, oracle.nll_oracle_T[big_layers])
    loss_full = float(np.quantile(oracle.nll_small_T, _SHADE_QUANTILE))
    gain_full = float(np.quantile(gain_T, _SHADE_QUANTILE))
    shown = []
    for document, name in enumerate(oracle.documents[:count]):
        rows = first_window(oracle, document)
        loss_shades = _shades(oracle.nll_small_T[rows], loss_full)
        gain_shades = _shades(gain_T[rows], gain_full)
        tokens = [
            Token(visible(oracle.text[t]), loss, gain, _numbers(oracle, t, big_layers))
            for t, loss, gain in zip(rows, loss_shades, gain_shades, strict=True)
        ]
        shown.append(Passage(name, tokens, loss_full, gain_full))
    return shown


def first_window(oracle: OracleTable, document: int) -> list[int]:
    """Return the rows of a document's first window, in order of position."""
    mine = np.flatnonzero(oracle.document_T == document)
    first = oracle.window_T[mine].min()
    return [int(t) for t in mine[oracle.window_T[mine] == first]]


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


def _shades(values_T: Floats, full: float) -> Sequence[float]:
    shades_T = np.clip(values_T / full, 0, 1) if full > 0 else np.zeros(len(values_T))
    return [round(float(shade), 2) for shade in shades_T]


def _numbers(oracle: OracleTable, t: int, k: int) -> str:
    small, best = oracle.nll_small_T[t], oracle.nll_oracle_T[k][t]
    return f"all small {small:.2f}, oracle {best:.2f}, gain {small - best:.2f}, all big {oracle.nll_big_T[t]:.2f} nats"
