"""Packed tokens on disk, memory-mapped: training batches and windows for evaluation.

Shape letters: B batch, T tokens, W windows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from duollm.data.tokenizer import load_tokenizer
from duollm.errors import UserError, did_you_mean, in_a_line
from duollm.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_COLUMNS = {"document", "domain", "split", "start", "length"}
_DAMAGED = (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError)
"""What reading a damaged file may raise."""


@dataclass(frozen=True)
class Windows:
    """Full windows from the start of documents, in order of document name, then window."""

    token_ids: NDArray[np.int64]
    """[W, T]"""
    documents: list[str]
    """The document of each window, [W]."""
    window: list[int]
    """Which window of its document each is, 0 first, [W]."""

    def part(self, rows: slice) -> "Windows":
        """Return some of the windows."""
        return Windows(self.token_ids[rows], self.documents[rows], self.window[rows])

    def columns(self) -> dict[str, NDArray[Any]]:
        """Return the columns that name each predicted token, window by window (docs/formats.md)."""
        predicted = self.token_ids.shape[1] - 1
        return {
            "document": np.repeat(self.documents, predicted),
            "window": np.repeat(np.asarray(self.window, dtype=np.int32), predicted),
            "position": np.tile(np.arange(1, predicted + 1, dtype=np.int32), len(self.window)),
            "token_id": self.token_ids[:, 1:].flatten().astype(np.int32),
        }


@dataclass(frozen=True, eq=False)
class PackedData:
    """A `data/` folder (docs/formats.md)."""

    folder: Path
    manifest: Mapping[str, Any]
    tokens: Mapping[str, NDArray[np.unsignedinteger[Any]]]
    """Token ids of each split, flat, memory-mapped."""

    @classmethod
    def open(cls, folder: Path) -> "PackedData":
        """Open what `prepare_data` wrote.

        Raises:
            UserError: `folder` does not hold packed data, or damaged ones.
        """
        try:
            manifest = read_json(folder / "manifest.json")
            tokens = {split: open_memmap(folder / f"{split}.npy", mode="r") for split in manifest["splits"]}
            columns = set(pq.read_schema(folder / "documents.parquet").names)
            data = cls(folder, manifest, tokens)
            _ = data.vocab_size, data.end_of_text_id, data.sequence_length, data.fingerprint, data.domains
            for split, packed in tokens.items():  # the tokens themselves are checked when they are used
                counted = sum(domain["tokens"] for domain in manifest["splits"][split].values())
                if packed.ndim != 1 or packed.dtype.kind != "u" or len(packed) != counted:
                    raise ValueError(f"{split}.npy does not hold the {counted} tokens that manifest.json counts")
            if lacking := _COLUMNS - columns:
                raise ValueError(f"documents.parquet lacks {', '.join(sorted(lacking))}")
        except FileNotFoundError as error:
            missing = Path(error.filename or "documents.parquet").name  # Arrow does not say which file is missing
            raise UserError(f"{folder}: not a folder of packed data: {missing} is missing") from None
        except _DAMAGED as error:
            raise _damaged(folder, error) from None
        return data

    @property
    def vocab_size(self) -> int:
        """Number of token ids, V."""
        return int(self.manifest["vocab_size"])

    @property
    def end_of_text_id(self) -> int:
        """The token that closes every document."""
        return int(self.manifest["end_of_text_id"])

    @property
    def sequence_length(self) -> int:
        """Tokens per training sequence and per window, T."""
        return int(self.manifest["sequence_length"])

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the source text, the split and the tokenizer."""
        return str(self.manifest["fingerprint"])

    @property
    def domains(self) -> list[str]:
        """Names of the domains, safe as file names, in the recipe's order."""
        return [source["domain"] for source in self.manifest["sources"]]

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """The tokenizer that made the tokens."""
        return load_tokenizer(self.folder / "tokenizer")

    def train_batch(self, step: int, batch_size: int, seed: int, split: str = "train") -> NDArray[np.int64]:
        """Return the token ids of one training step, [B, T]. They depend on the arguments alone.

        The split is cut into chunks of T tokens, across documents. Every epoch starts cutting at another token,
        shuffles the chunks anew and takes each chunk once. A batch may span two epochs.

        Raises:
            UserError: the split is too short for one chunk.
        """
        tokens, length = self.tokens[split], self.sequence_length
        chunks = chunks_per_epoch(len(tokens), length, split)
        drawn_B = range(step * batch_size, (step + 1) * batch_size)
        starts_B = [_chunk_starts(chunks, length, seed, draw // chunks)[draw % chunks] for draw in drawn_B]
        return tokens[np.asarray(starts_B)[:, None] + np.arange(length)].astype(np.int64)

    def windows(self, split: str, domain: str, documents: int, windows_per_document: int, seed: int) -> Windows:
        """Return the first full windows of T tokens of documents drawn at random.

        A document's closing end-of-text token counts as one of its tokens. The draw depends on the seed alone,
        and a larger draw contains the documents of a smaller one. If there is too little text, there are
        fewer documents, or fewer windows of a document.

        Raises:
            UserError: unknown split or domain, or no document of T tokens.
        """
        length = self.sequence_length
        rows = self._rows_of(split, domain)
        eligible = [row for row in rows if row["length"] >= length]
        if not eligible:
            longest = max(row["length"] for row in rows)
            raise UserError(
                f"domain {domain!r} has no document of {length} tokens in the {split} split (the longest has "
                f"{longest}); lower sequence_length or give longer documents"
            )
        drawn = np.random.default_rng(seed).permutation(len(eligible))[:documents]
        places = [
            (row["document"], window, row["start"] + window * length)
            for row in sorted((eligible[index] for index in drawn), key=lambda row: str(row["document"]))
            for window in range(min(windows_per_document, row["length"] // length))
        ]
        names, numbers, starts_W = zip(*places, strict=True)
        token_ids_WT = self.tokens[split][np.asarray(starts_W)[:, None] + np.arange(length)]
        largest = token_ids_WT.max()
        if largest >= self.vocab_size:
            raise _damaged(self.folder, ValueError(f"{split}.npy holds token {largest} of {self.vocab_size}"))
        return Windows(token_ids_WT.astype(np.int64), list(names), list(numbers))

    def documents_of_each(self, split: str, most: int) -> int:
        """Return how many documents of at least T tokens every domain has, at most `most`."""
        lengths = [[row["length"] for row in self._rows_of(split, domain)] for domain in self.domains]
        return min(most, *(sum(length >= self.sequence_length for length in each) for each in lengths))

    def balanced_sample(self, split: str, number: int, windows_per_document: int, seed: int) -> NDArray[np.int64]:
        """Return about `number` windows [W, T], equally many from each domain, alternating between domains.

        They are windows from the start of documents, as in `windows`, because a study is scored on such windows and
        the starts of documents are not like the rest. If no domain has enough, there are fewer. If one domain
        has fewer than another, its windows repeat.

        Raises:
            UserError: as `windows`.
        """
        each = -(-number // len(self.domains))
        of_domains = [self.windows(split, domain, each, windows_per_document, seed) for domain in self.domains]
        each = min(each, max(len(windows.token_ids) for windows in of_domains))
        samples = [np.resize(windows.token_ids, (each, self.sequence_length)) for windows in of_domains]
        return np.stack(samples, axis=1).reshape(-1, self.sequence_length)

    def _rows_of(self, split: str, domain: str) -> list[dict[str, Any]]:
        if split not in self.tokens:
            raise UserError(f"unknown split {split!r}; {did_you_mean(split, self.tokens)}")
        if domain not in self.domains:
            raise UserError(f"unknown domain {domain!r}; {did_you_mean(domain, self.domains)}")
        of_both = [("split", "==", split), ("domain", "==", domain)]
        try:
            rows = pq.read_table(self.folder / "documents.parquet", filters=of_both).to_pylist()
            if not rows or max(row["start"] + row["length"] for row in rows) > len(self.tokens[split]):
                raise ValueError(f"documents.parquet does not fit {split}.npy")
        except _DAMAGED as error:
            raise _damaged(self.folder, error) from None
        return rows


def _damaged(folder: Path, error: Exception) -> UserError:
    return UserError(f"{folder}: damaged ({in_a_line(error)}); remove that folder, and `duollm study` makes it anew")


def chunks_per_epoch(tokens: int, sequence_length: int, split: str) -> int:
    """Return how many chunks an epoch has, whichever of the first `sequence_length` tokens it starts at.

    Raises:
        UserError: not even one chunk fits.
    """
    chunks = (tokens - sequence_length + 1) // sequence_length
    if chunks < 1:
        raise UserError(
            f"the {split} split has {tokens} tokens; sequences of {sequence_length} need at least "
            f"{2 * sequence_length - 1}: give more text or lower sequence_length"
        )
    return chunks


@lru_cache(maxsize=2)  # the epochs that one batch may span
def _chunk_starts(chunks: int, sequence_length: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Where each chunk of an epoch starts, in the order in which they are taken."""
    random = np.random.default_rng([seed, epoch])
    offset = random.integers(sequence_length)
    return np.asarray(offset + sequence_length * random.permutation(chunks), dtype=np.int64)
