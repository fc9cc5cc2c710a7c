"""Turns documents into token ids, and refuses text that the tokenizer cannot reproduce."""

from collections.abc import Iterable, Iterator, Sequence
from io import StringIO
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from duollm.data.documents import Document
from duollm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_BATCH_CHARACTERS = 1_000_000
_SHOWN_CHARACTERS = 60


class Encoder:
    """Encodes text as plain text: no special tokens added, none found in it.

    Its ids *represent* a text if they contain neither the unknown nor the end-of-text token, and decode
    to the same text, after the tokenizer's own normaliser on both sides. Spaces at the start of a document
    do not count, because SentencePiece-like tokenizers add one there.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a document is text like any other
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._reserved = {tokenizer.unk_token_id, tokenizer.eos_token_id} - {None}

    def encode(self, documents: Iterable[Document]) -> Iterator[list[int]]:
        """Yield the token ids of each document, without the closing end-of-text token.

        Raises:
            UserError: a document is not represented; the message names it and its first bad line.
        """
        for batch in _batches(documents):
            texts = [document.text for document in batch]
            ids_of = self._ids(texts)
            for document, ids, faithful in zip(batch, ids_of, self._represented(texts, ids_of), strict=True):
                if not faithful:
                    raise UserError(self._complaint(document))
                yield ids

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def _represented(self, texts: Sequence[str], ids_of: Sequence[list[int]]) -> Iterator[bool]:
        decoded = self._tokenizer.decode_batch(ids_of, skip_special_tokens=False)
        for text, ids, back in zip(texts, ids_of, decoded, strict=True):
            yield self._reserved.isdisjoint(ids) and self._normal(back) == self._normal(text)

    def _normal(self, text: str) -> str:
        text = text.lstrip(" ")
        normalizer = self._tokenizer.normalizer
        return normalizer.normalize_str(text) if normalizer else text

    def _complaint(self, document: Document) -> str:
        lines = list(StringIO(document.text, newline="\n"))
        number = self._first_bad_line(lines)
        return (
            f"{document.name} (domain {document.domain}), line {number} of its text: the tokenizer cannot represent "
            f"{lines[number - 1][:_SHOWN_CHARACTERS]!r}; use a byte-level tokenizer, "
            f"or leave data.tokenizer out to train one"
        )

    def _first_bad_line(self, lines: Sequence[str]) -> int:
        """Number (from 1) of a line up to which the text is not represented while it is before.

        Whole beginnings of the text are tried, since what a token may hold need not end with a line.
        """
        good, bad = 0, len(lines)
        while bad - good > 1:
            middle = (good + bad) // 2
            beginning = ["".join(lines[:middle])]
            if all(self._represented(beginning, self._ids(beginning))):
                good = middle
            else:
                bad = middle
        return bad


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Group documents so that a batch has about a million characters: parallel, yet small in memory."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
