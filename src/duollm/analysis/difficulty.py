"""Difficulty of tokens: not their loss, but how much of it more compute can remove (paper, figures 5 and 6).

A gain that is known with the label in hand is mostly luck. So beside each stands its part without selection noise: what
the predictable ceiling gains, and what the same search gains at the same tokens on drawn labels.

Classes of tokens go by their place in a line and a word, and in Python by what they are part of: its own tokenizer
reads the text of the document, which may end anywhere.

Shape letters: T tokens, D documents, X draws of the bootstrap, H = 2 halves of the documents.
"""

import io
import keyword
import re
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from duollm.analysis.results import ClassRow, DifficultyRow, HelpedRow
from duollm.records.bootstrap import Bootstrap, Estimate, Floats, Integers, interval, sum_by_document
from duollm.records.keys import (
    ALL_BIG,
    ALL_SMALL,
    DRAWN_ORACLE,
    DRAWN_STATIC,
    EXACT,
    NET_ORACLE,
    ORACLE,
    Key,
    ceiling_policy,
)
from duollm.records.patterns import first_half
from duollm.records.records import Records
from duollm.records.tokens import Tokens

LINE_START = "line start"
_STRING_OPENS = re.compile(r"\s*[rbfuRBFU]{0,2}(\"\"\"|''')")
_NO_CLASS = "white space"
HIGH_LOSS_QUANTILE = 0.75
NOTHING, MUCH = 0.1, 1.0
"""C11: nats that a route must save to help a token, and to help it much."""
LEAST_OCCURRENCES = 3
"""Of a token in each half of the documents, to be ranked by how much it is helped."""
HARD, LINE_STARTS = "hard", "line starts"
"""Sums of a document. Of tokens with a high loss: how many, those that nothing helps, those helped much [D, 3]. And
[D, 2, 3] for tokens elsewhere and at line starts: how many, nll under all small, gain."""


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


def difficulty(tokens: Tokens, big_layers: int) -> tuple[Floats, Floats]:
    """Return, per token [T], the loss of all small and by how much the oracle of a budget lowers it, nats."""
    nll_small_T = tokens.policies[Key(ALL_SMALL, 0)].nll_T
    return nll_small_T, nll_small_T - tokens.oracle(big_layers).nll_T


def difficulty_rows(tokens: Tokens, bootstrap: Bootstrap) -> Iterator[DifficultyRow]:
    """Yield, per budget, how loss and difficulty relate (paper, figure 5)."""
    for k in tokens.searched():
        if tokens.space.big_layers[0] < k < tokens.space.big_layers[-1]:
            nll_small_T, gain_T = difficulty(tokens, k)
            share_X = hard_without_gain(nll_small_T, gain_T, tokens.document_T, bootstrap)
            yield DifficultyRow(tokens.domain, k, float(np.median(gain_T)), interval(share_X))


def hard_without_gain(nll_small_T: Floats, gain_T: Floats, document_T: Integers, bootstrap: Bootstrap) -> Floats:
    """Return the share of high-loss tokens that gain less than the median token, draws [X].

    High loss means the top quarter of nll under all small. The share would be 0 if difficulty were the loss itself, and
    0.5 if the two were unrelated. Both thresholds come from the data and stay fixed over the resamples.
    """
    high_T = has_high_loss(nll_small_T)
    wasted_T = high_T & (gain_T < np.median(gain_T))
    counts_DQ = sum_by_document(
        np.stack([wasted_T, high_T], 1).astype(np.float64), document_T, int(document_T.max()) + 1
    )
    return bootstrap.ratio(counts_DQ[:, 0], counts_DQ[:, 1])


def has_high_loss(nll_small_T: Floats) -> NDArray[np.bool_]:
    """Return which tokens [T] are in the top quarter of nll under all small."""
    return nll_small_T >= np.quantile(nll_small_T, HIGH_LOSS_QUANTILE)


def with_difficulty(records: Records, tokens: Tokens) -> Records:
    """Add the sums `HARD`, and for Python `LINE_STARTS`, of every search at the low budget."""
    sums, classes = dict(records.sums), classes_of(tokens)
    high_T = has_high_loss(tokens.policies[Key(ALL_SMALL, 0)].nll_T)
    starts_T = classes["form"] == LINE_START if "python" in classes else None
    for key, losses_3T in _searches(tokens).items():
        small_T, big_T, oracle_T = losses_3T
        saved_T = small_T - np.minimum(big_T, oracle_T)
        counted_T3 = np.stack([high_T, high_T & (saved_T < NOTHING), high_T & (small_T - oracle_T >= MUCH)], axis=1)
        sums[HARD, key] = tokens.by_document(counted_T3.astype(np.float64))
        if starts_T is not None:
            values_T3 = np.stack([np.ones_like(small_T), small_T, small_T - oracle_T], axis=1)
            there_T2 = np.stack([~starts_T, starts_T], axis=1)
            sums[LINE_STARTS, key] = tokens.by_document(values_T3[:, None] * there_T2[..., None])
    return replace(records, sums=sums)


def _searches(tokens: Tokens) -> dict[Key, list[Floats]]:
    """Return the losses [T] of all small, all big and every search at the low budget, on the labels of that search."""
    layers, found = tokens.space.num_layers, {}
    k = tokens.space.focus_budgets[0]
    nll = {key: one.nll_T for key, one in tokens.policies.items()}
    small, big, static = (Key(DRAWN_STATIC, number) for number in (0, layers, k))
    for key in [key for key in nll if key.policy == ORACLE and key.big_layers == k]:
        ends = [nll[Key(ALL_SMALL, 0)], nll[Key(ALL_BIG, layers)]]
        found[key] = [*ends, nll[key]]
        drawn = key._replace(policy=DRAWN_ORACLE)
        if drawn in nll and static in nll:
            found[key._replace(policy=NET_ORACLE)] = [*ends, nll[key] + nll[static] - nll[drawn]]
            if small in nll and big in nll:
                found[drawn] = [nll[small], nll[big], nll[drawn]]
    return found


def class_rows(tokens: Tokens, bootstrap: Bootstrap) -> Iterator[ClassRow]:
    """Yield loss and gains of every class of tokens, at the low budget."""
    k, searches = tokens.space.focus_budgets[0], _searches(tokens)
    oracle = Key(ORACLE, k, context=tokens.context)
    if oracle not in searches:
        return
    gains, high_T = _gains(tokens, k), has_high_loss(searches[oracle][0])
    helped = {name: searches.get(oracle._replace(policy=name)) for name in (ORACLE, DRAWN_ORACLE)}
    unhelped = {
        name: None if losses is None else losses[0] - np.minimum(losses[1], losses[2]) < NOTHING
        for name, losses in helped.items()
    }

    def share(part_T: NDArray[np.bool_] | Floats | None, of_T: NDArray[np.bool_]) -> Estimate | None:
        if part_T is None or not of_T.any():
            return None
        counts_DQ = tokens.by_document(np.stack([part_T * of_T, of_T], axis=1).astype(np.float64))
        return interval(bootstrap.ratio(counts_DQ[:, 0], counts_DQ[:, 1]))

    everything = {"all": np.full(len(high_T), "all tokens")}
    for kind, class_T in (everything | classes_of(tokens)).items():
        for name in dict.fromkeys(class_T.tolist()):
            mine_T = class_T == name
            yield ClassRow(
                tokens.domain,
                k,
                kind,
                name,
                int(mine_T.sum()),
                nll_small=share(searches[oracle][0], mine_T),
                **{field: share(gain_T, mine_T) for field, gain_T in gains.items()},
                high_loss=share(high_T, mine_T),
                unhelped=share(unhelped[ORACLE], mine_T & high_T),
                unhelped_drawn=share(unhelped[DRAWN_ORACLE], mine_T & high_T),
            )


def _gains(tokens: Tokens, k: int) -> dict[str, Floats | None]:
    """Return by how much [T] the oracle, all big and the ceiling lower the loss of all small; and on drawn labels."""
    policies, layers = tokens.policies, tokens.space.num_layers
    keys = {
        "gain": (Key(ALL_SMALL, 0), Key(ORACLE, k, context=tokens.context)),
        "gain_all_big": (Key(ALL_SMALL, 0), Key(ALL_BIG, layers)),
        "gain_predicted": (Key(ALL_SMALL, 0), Key(ceiling_policy(EXACT), k)),
        "gain_drawn": (Key(DRAWN_STATIC, 0), Key(DRAWN_ORACLE, k, context=tokens.context)),
    }
    return {
        name: policies[small].nll_T - policies[other].nll_T if small in policies and other in policies else None
        for name, (small, other) in keys.items()
    }


def helped_rows(tokens: Tokens, seed: int, most: int = 10) -> Iterator[HelpedRow]:
    """Yield the tokens that the oracle of the low budget helps most, ranked on one half of the documents.

    The gains are those on the other half: the best of many on the text that ranked them would be too good.
    """
    # Numpy's own strings would lose the zero that a text may end with.
    k, texts = tokens.space.focus_budgets[0], np.array(tokens.text, dtype=object)
    gains = {name: gain_T for name, gain_T in _gains(tokens, k).items() if gain_T is not None}
    if "gain" not in gains:
        return
    names, word_T = np.unique(texts, return_inverse=True)
    in_first_T = first_half(len(tokens.documents), seed)[tokens.document_T]
    counts_HW = np.stack([np.bincount(word_T[half_T], minlength=len(names)) for half_T in (in_first_T, ~in_first_T)])
    often_W = (counts_HW >= LEAST_OCCURRENCES).all(0)

    def means(gain_T: Floats, half_T: NDArray[np.bool_]) -> Floats:
        sums_W = np.bincount(word_T[half_T], gain_T[half_T], len(names))
        return np.asarray(sums_W / np.maximum(np.bincount(word_T[half_T], minlength=len(names)), 1))

    ranked_W = np.argsort(np.where(often_W, -means(gains["gain"], in_first_T), np.inf), kind="stable")
    other = {name: means(gain_T, ~in_first_T) for name, gain_T in gains.items()}
    for word in ranked_W[: min(most, int(often_W.sum()))].tolist():
        scored = {name: float(gain_W[word]) for name, gain_W in other.items()}
        yield HelpedRow(tokens.domain, k, str(names[word]), int(counts_HW[:, word].sum()), **scored)
