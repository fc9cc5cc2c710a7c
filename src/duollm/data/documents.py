"""One document of text, and reading documents from one local file."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from duollm.errors import UserError

TEXT_KEY = "text"
"""The key of a JSON line, or the column of a table, that holds a document's text."""


@dataclass(frozen=True)
class Document:
    """The unit that is never divided between splits."""

    domain: str
    name: str
    """Unique within the domain and the same on every machine."""
    text: str


def read_file(path: Path, domain: str, name: str) -> Iterator[Document]:
    """Yield the documents of `path`; `name` is what the file is called in their names.

    `.jsonl` holds a document per line (`name:line`), `.parquet` one per row (`name:row`, from 1),
    anything else is one UTF-8 text.

    Raises:
        UserError: empty, unreadable or not UTF-8; bad JSON; no text where text is expected. The
            message names the file and the line.
    """
    readers = {".jsonl": _read_json_lines, ".parquet": _read_parquet}
    reader = readers.get(path.suffix.lower(), _read_plain)
    empty = True
    try:
        for place, text in reader(path):
            empty = False
            yield Document(domain, name + place, text)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    if empty:
        raise UserError(f"{path}: holds no documents; fill it or leave it out")


def _read_plain(path: Path) -> Iterator[tuple[str, str]]:
    yield "", _checked(_decode(path.read_bytes(), path), f"{path}, line 1")


def _read_json_lines(path: Path) -> Iterator[tuple[str, str]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f":{number}", _text_of_json(_decode(line, path, number), f"{path}, line {number}")


def _text_of_json(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(value, dict):
        raise UserError(f'{where}: expected an object such as {{"{TEXT_KEY}": "..."}}, got {type(value).__name__}')
    if not isinstance(value.get(TEXT_KEY), str):
        raise UserError(f"{where}: no string under the key {TEXT_KEY!r}; keys here: {', '.join(value) or 'none'}")
    return _checked(value[TEXT_KEY], where)


def _read_parquet(path: Path) -> Iterator[tuple[str, str]]:
    try:
        table = pq.ParquetFile(path)
    except ValueError as error:
        raise UserError(f"{path}: not a Parquet file: {error}") from None
    _check_text_column(table.schema_arrow, path)
    row = 0
    for batch in table.iter_batches(columns=[TEXT_KEY]):
        # As bytes, because Arrow does not check that its strings are UTF-8.
        for raw in batch.column(0).cast("large_binary").to_pylist():
            row += 1
            where = f"{path}, row {row}"
            yield f":{row}", _checked(_decode(raw or b"", where), where)


def _check_text_column(schema: Any, path: Path) -> None:
    if TEXT_KEY not in schema.names:
        raise UserError(f"{path}: no column {TEXT_KEY!r}; columns here: {', '.join(schema.names) or 'none'}")
    kind = schema.field(TEXT_KEY).type
    if str(kind) not in ("string", "large_string", "binary", "large_binary"):
        raise UserError(f"{path}: the column {TEXT_KEY!r} must hold strings, got {kind}")


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
