"""Hugging Face data sets as a source of documents (extra `data`)."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from duollm.data.documents import TEXT_KEY, Document
from duollm.errors import UserError
from duollm.files import fingerprint
from duollm.options import LARGEST_COUNT

DEFAULT_DOCUMENTS = 10_000
"""Documents taken from a data set unless its id says otherwise."""

_ID = re.compile(r"[\w.-]+/[\w.-]+(:[^:]*){0,3}")
_FORM = "owner/name[:config[:split[:documents]]]"


@dataclass(frozen=True)
class HubCorpus:
    """The first `documents` non-empty rows of one split of a data set, streamed in their order."""

    name: str
    data_set: str
    config: str | None = None
    split: str = "train"
    limit: int = DEFAULT_DOCUMENTS

    @property
    def origin(self) -> str:
        """Where the text comes from, for the provenance."""
        config = f", config {self.config}" if self.config else ""
        return f"Hugging Face {self.data_set}{config}, split {self.split}, first {self.limit} documents"

    def documents(self) -> Iterator[Document]:
        """Yield the documents, named by their row (from 1).

        Raises:
            UserError: `datasets` is not installed, the hub does not deliver, or there is no text column.
        """
        rows = enumerate(self._rows(), start=1)
        with_text = ((row, text) for row, values in rows if (text := self._text(values)).strip())
        for row, text in islice(with_text, self.limit):
            yield Document(self.name, f"{self.split}:{row}", text)

    def fingerprint(self) -> str:
        """Return a fingerprint of the id alone. The hub is not contacted."""
        return fingerprint([self.data_set, self.config, self.split, self.limit])

    def _rows(self) -> Iterable[dict[str, Any]]:
        try:
            import datasets
        except ImportError:
            raise UserError(
                f"{self.data_set}: no such file or folder; to read it as a Hugging Face data set: "
                f"pip install 'duollm[data]'"
            ) from None
        try:
            yield from datasets.load_dataset(self.data_set, self.config, split=self.split, streaming=True)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{self.data_set}: the Hugging Face hub does not deliver it: {reason}") from None

    def _text(self, values: dict[str, Any]) -> str:
        text = values.get(TEXT_KEY)
        if not isinstance(text, str):
            raise UserError(f"{self.data_set}: no text column {TEXT_KEY!r}; columns there: {', '.join(values)}")
        return text


def is_data_set_id(domain: str) -> bool:
    """Say whether `domain` has the form owner/name, with or without `:config:split:documents`."""
    return _ID.fullmatch(domain) is not None


def parse_data_set_id(domain: str) -> HubCorpus:
    """Read `owner/name[:config[:split[:documents]]]`; empty parts keep their defaults.

    Raises:
        UserError: `documents` is not a positive integer.
    """
    data_set, config, split, limit = (domain.split(":") + [""] * 3)[:4]
    if limit and not 1 <= _number(limit) <= LARGEST_COUNT:
        raise UserError(
            f"{domain}: documents must be from 1 to {LARGEST_COUNT:,}, got {limit[:50]!r}; the form is {_FORM}"
        )
    return HubCorpus(
        name=re.sub(r"[^\w.-]", "-", f"{data_set}:{config}" if config else data_set),  # parts of one set differ
        data_set=data_set,
        config=config or None,
        split=split or "train",
        limit=int(limit or DEFAULT_DOCUMENTS),
    )


def _number(text: str) -> float:
    return float(text) if text.isdecimal() else 0
