"""Dividing documents into train, validation and test."""

import hashlib
from collections.abc import Iterable, Sequence
from zlib import crc32

import numpy as np

from duollm.data.documents import Document
from duollm.errors import UserError

SPLITS = ("train", "validation", "test")
FEWEST_PER_SPLIT = 2


def distinct(documents: Iterable[Document]) -> list[Document]:
    """Drop documents that repeat an earlier text, so that no text is in two splits."""
    first_with: dict[str, Document] = {}
    for document in documents:
        first_with.setdefault(text_hash(document), document)
    return list(first_with.values())


def text_hash(document: Document) -> str:
    """Return the sha256 of the text, hexadecimal."""
    return hashlib.sha256(document.text.encode()).hexdigest()


def split_documents(
    domain: str, documents: Sequence[Document], validation_share: float, test_share: float, seed: int
) -> dict[str, list[Document]]:
    """Divide the documents of `domain` at random; each split gets at least two.

    A document's split depends on the seed, the domain's name and the number of documents, not on other domains.

    Raises:
        UserError: there are too few documents, or the shares leave fewer than two for training.
    """
    order = np.random.default_rng([seed, crc32(domain.encode())]).permutation(len(documents))
    validation = max(FEWEST_PER_SPLIT, round(validation_share * len(documents)))
    test = max(FEWEST_PER_SPLIT, round(test_share * len(documents)))
    if len(documents) < FEWEST_PER_SPLIT * len(SPLITS):
        raise UserError(
            f"domain {domain!r} has {len(documents)} different documents; at least {FEWEST_PER_SPLIT * len(SPLITS)} "
            f"are needed, {FEWEST_PER_SPLIT} per split (a document is a text file, a JSON line or a Parquet row)"
        )
    if len(documents) - validation - test < FEWEST_PER_SPLIT:
        raise UserError(
            f"validation_share ({validation_share}) and test_share ({test_share}) leave fewer than "
            f"{FEWEST_PER_SPLIT} of the {len(documents)} documents of {domain!r} for training; lower them"
        )
    shuffled = [documents[index] for index in order]
    return {
        "train": shuffled[validation + test :],
        "validation": shuffled[:validation],
        "test": shuffled[validation : validation + test],
    }
