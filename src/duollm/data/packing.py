"""Writes a `data/` folder: reads, splits, tokenizes and packs documents."""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from duollm.config import DataConfig
from duollm.data.corpora import Corpus, files_fingerprint, find_corpus
from duollm.data.documents import Document
from duollm.data.packed import PackedData, chunks_per_epoch
from duollm.data.tokenizer import Encoder, load_tokenizer, train_tokenizer, vocabulary_size
from duollm.errors import UserError
from duollm.files import fingerprint, replacing, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPLITS = ("train", "validation", "test")
FEWEST_PER_SPLIT = 2
_TOKENIZER_CHARACTERS = 50_000_000
_LARGEST_UINT16_VOCABULARY = 2**16

Splits = Mapping[str, Sequence[Document]]


def prepare_data(
    config: DataConfig,
    seed: int,
    folder: Path,
    progress: Callable[[str], None] = lambda line: None,
    only: Sequence[str] = SPLITS,
) -> PackedData:
    """Write `folder` (docs/formats.md), all of it or nothing, and open it.

    Of documents with the same text one is kept. If no tokenizer is given, one is trained on the train split, or on
    about 50 million characters of it. The text of all domains is held in memory.

    Args:
        progress: is called with one line per step.
        only: the splits to tokenize and write. The division into splits does not depend on it.

    Raises:
        UserError: a domain cannot be found, read, split or tokenized, or there is too little text.
    """
    corpora, texts = _read(config.domains, progress)
    shares = config.validation_share, config.test_share
    parts = [split_documents(domain, documents, *shares, seed) for domain, documents in texts.items()]
    splits = {split: [document for part in parts for document in part[split]] for split in SPLITS}
    if config.tokenizer:
        tokenizer = load_tokenizer(config.tokenizer)
    else:
        progress(f"training a tokenizer of {config.vocab_size} tokens")
        order = np.random.default_rng(seed).permutation(len(splits["train"]))
        shuffled = [splits["train"][index].text for index in order]
        enough = np.searchsorted(np.cumsum([len(text) for text in shuffled]), _TOKENIZER_CHARACTERS) + 1
        tokenizer = train_tokenizer(shuffled[:enough], config.vocab_size)
    progress("packing tokens")
    with replacing(folder) as partial:
        partial.mkdir()
        tokenizer.save_pretrained(partial / "tokenizer")
        splits = {split: splits[split] for split in only}
        rows = _write_tokens(splits, tokenizer, partial)
        if "train" in only:
            train_tokens = sum(row["length"] for row in rows if row["split"] == "train")
            chunks_per_epoch(train_tokens, config.sequence_length, "train")
        pq.write_table(pa.Table.from_pylist(rows), partial / "documents.parquet")
        write_json(partial / "manifest.json", _manifest(corpora, splits, rows, tokenizer, config.sequence_length))
    return PackedData.open(folder)


def source_fingerprint(config: DataConfig, seed: int) -> str:
    """Return a fingerprint of everything that `prepare_data` depends on, without tokenizing anything.

    It covers the settings, and the names and bytes of all source files and of a tokenizer folder. Data sets of the
    Hugging Face hub are assumed to change only with their id.
    """
    sources = [find_corpus(domain).fingerprint() for domain in config.domains]
    if config.tokenizer and os.path.isdir(config.tokenizer):
        files = sorted(path for path in Path(config.tokenizer).glob("*token*") if path.is_file())  # not the weights
        sources.append(files_fingerprint(files, Path(config.tokenizer)))
    return fingerprint([config.model_dump(), seed, sources])


def _read(domains: Sequence[str], progress: Callable[[str], None]) -> tuple[list[Corpus], dict[str, list[Document]]]:
    """Read the different documents of each domain; a text of two domains counts for the first."""
    corpora = [find_corpus(domain) for domain in domains]
    names = [corpus.name for corpus in corpora]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"domains: two domains are called {name!r}; rename one of the files or folders")
    documents: list[Document] = []
    for corpus in corpora:
        progress(f"reading {corpus.name}: {corpus.origin}")
        documents.extend(corpus.documents())
    different = distinct(documents)
    return corpora, {name: [each for each in different if each.domain == name] for name in names}


def _write_tokens(splits: Splits, tokenizer: "PreTrainedTokenizerFast", folder: Path) -> list[dict[str, Any]]:
    """Write the token file of each split; return the rows of documents.parquet."""
    dtype = np.uint16 if vocabulary_size(tokenizer) <= _LARGEST_UINT16_VOCABULARY else np.uint32
    encoder = Encoder(tokenizer)
    rows = []
    for split, documents in splits.items():
        packed, start = [], 0
        for document, ids in zip(documents, encoder.encode(documents), strict=True):
            packed.append(np.asarray([*ids, tokenizer.eos_token_id], dtype=dtype))
            place = {"split": split, "domain": document.domain, "document": document.name, "start": start}
            rows.append(place | {"length": len(packed[-1]), "bytes": len(document.text.encode())})
            start += len(packed[-1])
        np.save(folder / f"{split}.npy", np.concatenate(packed))
    return rows


def _manifest(
    corpora: Sequence[Corpus],
    splits: Splits,
    rows: Sequence[Mapping[str, Any]],
    tokenizer: "PreTrainedTokenizerFast",
    sequence_length: int,
) -> dict[str, Any]:
    """What was packed; no path of the machine occurs in it."""
    texts = [[split, part.domain, part.name, text_hash(part)] for split in splits for part in splits[split]]
    return {
        "fingerprint": fingerprint([texts, tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id]),
        "sources": [{"domain": corpus.name, "origin": corpus.origin} for corpus in corpora],
        "sequence_length": sequence_length,
        "vocab_size": vocabulary_size(tokenizer),
        "end_of_text_id": tokenizer.eos_token_id,
        "splits": {split: {corpus.name: _counts(rows, split, corpus.name) for corpus in corpora} for split in splits},
    }


def _counts(rows: Sequence[Mapping[str, Any]], split: str, domain: str) -> dict[str, int]:
    lengths = [row["length"] for row in rows if row["split"] == split and row["domain"] == domain]
    return {"documents": len(lengths), "tokens": sum(lengths)}


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
