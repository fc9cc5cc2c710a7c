"""Make the shipped lm-eval tasks: choose the true continuation of a held-out text among four.

    python tools/make_tasks.py [FOLDER]

writes prose.jsonl and code.jsonl into FOLDER (default: the shipped tasks' own). The documents are those of the test
split as a recipe with default shares and seed divides the built-in domains, so a model trained by such a
recipe has not seen them. The wrong continuations come from elsewhere in the same document, so that its topic
gives nothing away.
"""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

import duollm
from duollm.config import DataConfig
from duollm.data.corpora import find_corpus
from duollm.data.documents import Document
from duollm.data.packing import distinct, split_documents
from duollm.errors import UserError
from duollm.files import write_text

TASKS_FOLDER = Path(duollm.__file__).parent / "measure" / "tasks"
ITEMS, CHOICES = 150, 4
WORDS = {"prose": (64, 20), "code": (40, 12)}
"""Of each domain, words of the context and of each continuation; a word is what white space separates."""

_LONGEST_WORD = 80  # characters; tables and encoded data are no text to continue


def make_items(domain: str, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Yield the items of one task: `document`, `context`, `choices` and `answer`, the index of the true one."""
    context, continuation = WORDS[domain]
    random = np.random.default_rng([seed, crc32(domain.encode())])
    texts = {document.name: re.findall(r"\s*\S+", document.text) for document in _test_documents(domain, seed)}
    # Room for the item and as much again for each wrong continuation, so that a draw soon succeeds.
    names = [name for name, words in texts.items() if len(words) >= CHOICES * (context + continuation)]
    turn = 0
    made = 0
    while made < ITEMS:
        name = names[turn % len(names)]
        turn += 1
        item = _draw(texts[name], context, continuation, random)
        if item is not None:
            made += 1
            yield {"document": name} | item


def _draw(words: Sequence[str], context: int, continuation: int, random: np.random.Generator) -> dict[str, Any] | None:
    """Draw an item from one document; None if the places overlap, texts are equal or a word is too long."""
    true, *wrong = (int(start) for start in random.integers(context, len(words) - continuation + 1, CHOICES))
    answer = int(random.integers(CHOICES))
    spans = sorted([(true - context, true + continuation), *((start, start + continuation) for start in wrong)])
    if any(end > start for (_, end), (start, _) in pairwise(spans)):
        return None
    starts = [*wrong[:answer], true, *wrong[answer:]]
    choices = ["".join(words[start : start + continuation]) for start in starts]
    used = [word for start, end in spans for word in words[start:end]]
    if len({choice.strip() for choice in choices}) < CHOICES or max(map(len, used)) > _LONGEST_WORD:
        return None
    return {"context": "".join(words[true - context : true]).lstrip(), "choices": choices, "answer": answer}


def _test_documents(domain: str, seed: int) -> list[Document]:
    shares = DataConfig()
    documents = distinct(find_corpus(domain).documents())
    test = split_documents(domain, documents, shares.validation_share, shares.test_share, seed)["test"]
    return sorted(test, key=lambda document: document.name)


def as_json_lines(items: Iterator[dict[str, Any]]) -> str:
    """One item per line."""
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)


def main(arguments: Sequence[str]) -> int:
    """Write the items of every task; return the exit code."""
    folder = Path(arguments[0]) if arguments else TASKS_FOLDER
    try:
        for domain in WORDS:
            path = folder / f"{domain}.jsonl"
            write_text(path, as_json_lines(make_items(domain)))
            print(f"{path}: {ITEMS} items")
    except UserError as error:
        print(f"duollm: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
