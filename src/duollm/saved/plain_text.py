"""A text of any size, read and tokenized piece by piece, and cut into windows.

Shape letters: B windows of a batch, T tokens of a window.
"""

import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from itertools import tee
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from duollm.data.documents import Document, explained
from duollm.data.tokenizer import Encoder
from duollm.errors import UserError
from duollm.files import check_no_pointer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_PIECE = 100_000
"""Characters that are read at a time."""
_LONGEST_LINE = 1_000_000
"""After so many characters a text is cut wherever that is."""
_LINE_END = re.compile(r"\S\n(?=\S)")
"""Where a text may be cut. An empty line or an indent may share a token with the line break before it."""


class PlainText:
    """A UTF-8 text file, or standard input, that is never held in memory as a whole.

    Attributes:
        name: of the file, without its folder.
        tokens: how many have been read.
    """

    def __init__(self, given: str, tokenizer: "PreTrainedTokenizerFast") -> None:
        self.given, self.tokenizer = given, tokenizer
        self.name = _name(given)
        self.tokens, self._bytes, self._size = 0, 0, 0

    @property
    def all_tokens(self) -> int:
        """About how many tokens the whole text has: as many per byte as what has been read."""
        return round(self.tokens * max(1.0, self._size / max(self._bytes, 1)))

    def windows(self, length: int, batch_size: int) -> Iterator[NDArray[np.int64]]:
        """Yield the text as batches of windows of `length` tokens, [B, T]; the last window may be shorter.

        Windows overlap by one token, and the first begins with the token that begins a text. So each token of the text
        is predicted once.

        Raises:
            UserError: the text is empty or cannot be read, or the tokenizer cannot represent it.
        """
        yield from overlapping(self._encoded(), length, batch_size)
        if not self.tokens:
            raise UserError(f"{self.name}: the text is empty; give one with words")

    def _encoded(self) -> Iterator[list[int]]:
        begin, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        yield [end if begin is None else begin]
        with opened(self.given) as file:
            self._size = os.fstat(file.fileno()).st_size
            pieces, sizes = tee(self._pieces(file))
            for piece, ids in zip(sizes, Encoder(self.tokenizer).encode(pieces), strict=True):
                self.tokens, self._bytes = self.tokens + len(ids), self._bytes + len(piece.text.encode())
                yield ids

    def _pieces(self, file: TextIOWrapper) -> Iterator[Document]:
        line, text = 1, ""
        while new := file.read(_PIECE):
            text += new
            end = max((match.end() for match in _LINE_END.finditer(text)), default=0)
            if not end and len(text) < _LONGEST_LINE:
                continue
            end = end or len(text)
            yield Document("text", f"{self.name} from line {line}", text[:end])
            line, text = line + text.count("\n", 0, end), text[end:]
        if text:
            yield Document("text", f"{self.name} from line {line}", text)


@contextmanager
def opened(given: str, newline: str | None = "") -> Iterator[TextIOWrapper]:
    """Open a UTF-8 text file, or standard input for "-".

    Raises:
        UserError: it cannot be read, or what is read of it is not UTF-8.
    """
    try:
        if given == "-":
            if not isinstance(sys.stdin, TextIOWrapper):
                raise UserError("the text is to come from standard input, which is closed; give a text or a file")
            sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict", newline=newline)  # whatever the locale says
            yield sys.stdin
            return
        path = Path(given)
        with explained(path):
            check_no_pointer(path)
            with path.open(encoding="utf-8-sig", newline=newline) as file:
                yield file
    except UnicodeDecodeError as error:
        bad = error.object[error.start : error.end]
        raise UserError(f"{_name(given)}: not UTF-8, it holds {bad!r}; convert it to UTF-8") from None


def _name(given: str) -> str:
    return "standard input" if given == "-" else Path(given).name


def overlapping(pieces: Iterable[Sequence[int]], length: int, batch_size: int) -> Iterator[NDArray[np.int64]]:
    """Yield token ids as batches of windows [B, T] that overlap by one token; the last window may be shorter."""
    stride, waiting = length - 1, []  # type: int, list[int]

    def windows(rows: int) -> NDArray[np.int64]:
        return sliding_window_view(waiting[: rows * stride + 1], length)[::stride].copy()

    for ids in pieces:
        waiting += ids
        while len(waiting) > batch_size * stride:
            yield windows(batch_size)
            del waiting[: batch_size * stride]
    if whole := (len(waiting) - 1) // stride:
        yield windows(whole)
    if len(waiting) > whole * stride + 1:
        yield np.array([waiting[whole * stride :]])
