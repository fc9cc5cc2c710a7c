"""Classes of tokens: by their place in a line and a word, and for Python by what they are part of.

Python's own tokenizer reads the text of the document, which may end anywhere.
"""

import io
import keyword
import re
import tokenize
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from duollm.records.tokens import Tokens

LINE_START = "line start"
_STRING_OPENS = re.compile(r"\s*[rbfuRBFU]{0,2}(\"\"\"|''')")
_NO_CLASS = "white space"


def is_python(tokens: Tokens) -> bool:
    """Return whether a domain is Python: it is called code or python, or its documents are .py files."""
    named = re.search("code|python", tokens.domain, re.IGNORECASE)
    return bool(named) or all(name.endswith(".py") for name in tokens.documents)


def classes_of(tokens: Tokens) -> dict[str, NDArray[np.str_]]:
    """Return the class of each token [T] by kind of classes: `form`, and for Python also `python`.

    Returns:
        Nothing if the file does not hold the tokens that begin the windows: without them the text has holes.
    """
    if not tokens.file.has("before"):
        return {}
    before = tokens.file.strings("before")
    texts, kinds = tokens.text, {"form": forms} | ({"python": python_classes} if is_python(tokens) else {})
    found: dict[str, list[str]] = {kind: [] for kind in kinds}
    bounds = [0, *(np.flatnonzero(np.diff(tokens.document_T)) + 1).tolist(), len(texts)]
    for start, end in pairwise(bounds):
        pieces = [piece for t in range(start, end) for piece in ((before[t], False), (texts[t], True)) if any(piece)]
        for kind, classify in kinds.items():
            given = classify([text for text, _ in pieces])
            found[kind] += [name for name, (_, predicted) in zip(given, pieces, strict=True) if predicted]
    return {kind: np.array(names) for kind, names in found.items()}


def forms(texts: Sequence[str]) -> list[str]:
    """Name the form of each token of a text: line start, indentation, word start, inside a word, number, ...

    The first token on a line that is not blank is a line start, whatever it is.
    """
    found, blank_so_far, last = [], True, "\n"
    for text in texts:
        body = text.lstrip()
        lead = text[: len(text) - len(body)]
        if not body:
            found.append("line end" if "\n" in text else "indentation" if blank_so_far else "blank")
        elif blank_so_far or "\n" in lead:
            found.append(LINE_START)
        elif body[0].isdigit():
            found.append("number")
        elif _in_word(body[0]):
            found.append("inside a word" if not lead and _in_word(last) else "word start")
        else:
            found.append("punctuation")
        line = text.rpartition("\n")[2]
        blank_so_far = not line.strip() and (blank_so_far or "\n" in text)
        last = text[-1:] or last
    return found


def _in_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def python_classes(texts: Sequence[str]) -> list[str]:
    """Name what each token of a Python text is part of: keyword, identifier, operator, number, string, comment."""
    source = "".join(texts)
    of_character = np.full(len(source) + 1, _NO_CLASS, dtype=object)
    for start, end, name in _spans(source):
        of_character[start:end] = name
    found, position = [], 0
    for text in texts:
        lead = len(text) - len(text.lstrip())
        found.append(of_character[position + (lead if lead < len(text) else 0)])
        position += len(text)
    return found


def _spans(source: str) -> Iterator[tuple[int, int, str]]:
    """Yield the start, end and class of Python's tokens; where a line cannot be read, go on with the next one."""
    begin = 0
    while begin < len(source):
        reached = begin
        line_starts = [begin]
        for line in io.StringIO(source[begin:], newline="\n"):
            line_starts.append(line_starts[-1] + len(line))
        try:
            for token in tokenize.generate_tokens(io.StringIO(source[begin:], newline="\n").readline):
                start, end = (line_starts[min(row, len(line_starts)) - 1] + column for row, column in token[2:4])
                if name := _class_of(token):
                    yield start, end, name
                reached = max(reached, end)
            return
        except (tokenize.TokenError, SyntaxError):
            if _STRING_OPENS.match(source[reached:]):
                yield reached, len(source), "string"  # the text ends inside it
                return
            begin = source.find("\n", reached) + 1 or len(source)


def _class_of(token: tokenize.TokenInfo) -> str | None:
    if token.type == tokenize.NAME:
        return "keyword" if keyword.iskeyword(token.string) else "identifier"
    name = tokenize.tok_name[token.type]
    if name.startswith(("FSTRING", "TSTRING")):
        return "string"
    known = {"NUMBER": "number", "OP": "operator", "STRING": "string", "COMMENT": "comment"}
    return known.get(name)
