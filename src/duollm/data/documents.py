"""One document of text, and reading documents from one local file."""

import bz2
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.json
import pyarrow.parquet as pq

from duollm.errors import UserError
from duollm.files import check_no_pointer

TEXT_KEY = "text"
"""The key of a JSON line, or the column of a table, that holds a document's text."""

_OBJECT_ON_A_LINE = re.compile(r'\{\s*".*\}\s*$')


@dataclass(frozen=True)
class Document:
    """One text. All of it goes into the same split."""

    domain: str
    name: str
    """Unique within the domain and the same on every machine."""
    text: str


def read_file(path: Path, domain: str, name: str) -> Iterator[Document]:
    """Yield the documents of the file `path`. Their names begin with `name`.

    `.jsonl` and `.ndjson` hold a document per line (`name:line`), `.parquet`, `.arrow` and `.feather` one per
    row (`name:row`, from 1). A `.json` file may be JSON lines too, or a list of objects with a text
    (`name:element`, from 1), or one such object. Any other file is one UTF-8 text. Each file may be compressed
    (`.gz`, `.bz2`, `.xz`, `.lzma`, `.zst`, `.lz4`, `.br`).

    Raises:
        UserError: empty, unreadable, damaged, an archive, a Git LFS pointer or not UTF-8; bad JSON; no text where
            text is expected. The message names the file and the line.
    """
    format_suffix = path.with_suffix("") if path.suffix.lower() in _DECOMPRESS else path
    reader = _READERS.get(format_suffix.suffix.lower(), _read_plain)
    empty = True
    with explained(path):
        check_no_pointer(path)
    with explained(path), _opened(path) as file:
        for place, text in reader(file, path):
            empty = False
            yield Document(domain, name + place, text)
    if empty:
        raise UserError(f"{path}: holds no documents; fill it or leave it out")


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what the operating system or Arrow says about `path` into a UserError."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        reason = " ".join((getattr(error, "strerror", None) or str(error)).split())
        raise UserError(f"{path}: cannot be read: {reason}") from None


def _opened(path: Path) -> BinaryIO:
    decompress = _DECOMPRESS.get(path.suffix.lower())
    if decompress is None:
        return path.open("rb")
    compressed = path.read_bytes()
    try:
        return BytesIO(decompress(compressed))
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path}: damaged, or not compressed as {path.suffix} says: {error}") from None


def _read_plain(file: BinaryIO, path: Path) -> Iterator[tuple[str, str]]:
    yield "", _checked(_decode(file.read(), path), f"{path}, line 1")


def _refuse_archive(file: BinaryIO, path: Path) -> Iterator[tuple[str, str]]:
    raise UserError(f"{path}: an archive of files; unpack it, or leave it out")


def _read_json_lines(file: BinaryIO, path: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield f":{number}", _text_of(_parse_json(_decode(line, path, number), where), where)


def _read_json(file: BinaryIO, path: Path) -> Iterator[tuple[str, str]]:
    """A file called JSON may hold documents, or be source code or settings: then it is a text like any other."""
    text = _decode(file.read(), path)
    try:
        value = _parse_json(text, str(path))
    except UserError:
        value = None
        if any(_OBJECT_ON_A_LINE.match(line) for line in text.split("\n")):
            file.seek(0)
            yield from _read_json_lines(file, path)
            return
    if isinstance(value, list) and any(isinstance(element, tuple) and TEXT_KEY in dict(element) for element in value):
        for number, element in enumerate(value, start=1):
            yield f":{number}", _text_of(element, f"{path}, element {number}")
    elif isinstance(value, tuple) and isinstance(dict(value).get(TEXT_KEY), str):
        yield "", _text_of(value, str(path))
    else:
        yield "", _checked(text, f"{path}, line 1")


def _parse_json(text: str, where: str) -> Any:
    """Parse JSON; objects become tuples of pairs, in which a key may be found twice."""
    try:
        # Python refuses to make an integer of 5,000 digits, and here no number matters.
        return json.loads(text, object_pairs_hook=tuple, parse_int=float)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        return _parse_deep_json(text, where)


def _parse_deep_json(text: str, where: str) -> Any:
    """Parse an object as far as its text, without recursion; Arrow refuses a key that stands twice."""
    wanted = pyarrow.json.ParseOptions(pa.schema([(TEXT_KEY, pa.string())]), unexpected_field_behavior="ignore")
    try:
        rows = pyarrow.json.read_json(BytesIO(text.encode()), parse_options=wanted).to_pylist()
    except (pa.ArrowException, UnicodeEncodeError):
        rows = []
    if len(rows) != 1 or rows[0][TEXT_KEY] is None:
        raise UserError(f"{where}: JSON that is nested too deeply to be read; flatten it or leave it out")
    return tuple(rows[0].items())


def _text_of(value: Any, where: str) -> str:
    if not isinstance(value, tuple):
        raise UserError(f'{where}: expected an object such as {{"{TEXT_KEY}": "..."}}, got {type(value).__name__}')
    keys = [key for key, _ in value]
    if keys.count(TEXT_KEY) > 1:
        raise UserError(f"{where}: {keys.count(TEXT_KEY)} times the key {TEXT_KEY!r}; keep one")
    text = dict(value).get(TEXT_KEY)
    if not isinstance(text, str):
        raise UserError(f"{where}: no string under the key {TEXT_KEY!r}; keys here: {', '.join(keys) or 'none'}")
    return _checked(text, where)


def _read_parquet(file: BinaryIO, path: Path) -> Iterator[tuple[str, str]]:
    try:
        table = pq.ParquetFile(file)
    except ValueError as error:
        raise UserError(f"{path}: not a Parquet file: {error}") from None
    yield from _read_rows(table.schema_arrow, table.iter_batches(columns=[TEXT_KEY]), path)


def _read_arrow(file: BinaryIO, path: Path) -> Iterator[tuple[str, str]]:
    """Arrow has two formats with one suffix: a file that can be read at any place, and a stream of batches."""
    try:
        reader = pa.ipc.open_file(file)
        batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
    except ValueError:
        file.seek(0)
        try:
            batches = reader = pa.ipc.open_stream(file)
        except (ValueError, OSError) as error:
            raise UserError(f"{path}: not an Arrow file: {error}") from None
    yield from _read_rows(reader.schema, batches, path)


def _read_rows(schema: pa.Schema, batches: Iterable[pa.RecordBatch], path: Path) -> Iterator[tuple[str, str]]:
    named = schema.names.count(TEXT_KEY)
    if not named:
        raise UserError(f"{path}: no column {TEXT_KEY!r}; columns here: {', '.join(schema.names) or 'none'}")
    if named > 1:
        raise UserError(f"{path}: {named} columns are called {TEXT_KEY!r}; keep one")
    kind = schema.field(TEXT_KEY).type
    held = kind.value_type if pa.types.is_dictionary(kind) else kind
    if str(held) not in ("string", "large_string", "string_view", "binary", "large_binary", "binary_view"):
        raise UserError(f"{path}: the column {TEXT_KEY!r} must hold strings, got {kind}")
    row = 0
    for batch in batches:
        column = batch.column(TEXT_KEY)
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        # As bytes, because Arrow does not check that its strings are UTF-8.
        for raw in column.cast("large_binary").to_pylist():
            row += 1
            where = f"{path}, row {row}"
            yield f":{row}", _checked(_decode(raw or b"", where), where)


def _decode(raw: bytes, where: Path | str, first_line: int = 1) -> str:
    """Decode UTF-8, a byte-order mark removed; `first_line` is the number of the first line of `raw`."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = first_line + error.object.count(b"\n", 0, error.start)
        raise UserError(
            f"{where}, line {line}: byte {error.object[error.start]:#04x} is not UTF-8; "
            f"convert the text to UTF-8 or leave it out"
        ) from None


def _checked(text: str, where: str) -> str:
    if not text.strip():
        raise UserError(f"{where}: the text is empty; fill it or leave it out")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: half a surrogate pair ({text[error.start]!a}) is not a character; mend or leave it out"
        ) from None
    return text


def _decompress_by_arrow(codec: str, compressed: bytes) -> bytes:
    return bytes(pa.CompressedInputStream(pa.BufferReader(compressed), codec).read())


_ARROW_CODECS = {"zst": "zstd", "lz4": "lz4", "br": "brotli"}
_DECOMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
    ".lzma": lzma.decompress,
    **{f".{suffix}": partial(_decompress_by_arrow, codec) for suffix, codec in _ARROW_CODECS.items()},
}
_READERS = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".feather": _read_arrow,
    **dict.fromkeys([".tar", ".tgz", ".tbz2", ".txz", ".tzst", ".zip", ".7z", ".rar", ".z"], _refuse_archive),
}
SUFFIXES = {".txt", ".md", ".py", ".csv", *_READERS, *_DECOMPRESS}
"""How names of files often end."""
