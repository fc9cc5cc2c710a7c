"""Text of tokens as figures and the terminal show it."""

import numpy as np

from duollm.records.tokens import Tokens


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
