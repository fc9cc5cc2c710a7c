"""Parquet files of a run: the one writer, and the one reader, which checks what it reads."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from duollm.errors import UserError
from duollm.files import replacing
from duollm.records.bootstrap import Floats, Integers
from duollm.routes.space import RouteSpace

KINDS = {"tokens": "", "routes": ".routes", "best_of": ".best_of"}
"""The files of a domain and how their names end: a row per predicted token; per document and pattern; per document,
budget and number of random routes."""


def write_result(path: Path, columns: pa.Table | Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Write columns with `facts` as metadata, atomically."""
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    with replacing(path) as temporary:
        described = table.replace_schema_metadata({"duollm": json.dumps(facts)})
        pq.write_table(described, temporary, compression="zstd")


@dataclass(frozen=True)
class ResultFile:
    """A Parquet file with the facts that duollm keeps in its metadata."""

    path: Path
    table: Any
    facts: dict[str, Any]
    again: str
    """How to mend it."""

    @classmethod
    def open(cls, path: Path, made_by: str, folder: Path) -> "ResultFile":
        """Read a file that the command `made_by` writes. That command skips its work while `folder` exists.

        Raises:
            UserError: the file is missing or is no result of duollm.
        """
        again = f"delete the folder {folder} and run `{made_by}` again"
        try:
            table = pq.read_table(path).combine_chunks()
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; run `{made_by}` first") from None
        except (ValueError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path}: not a readable Parquet file ({reason}); {again}") from None
        facts = (table.schema.metadata or {}).get(b"duollm")
        if facts is None or table.num_rows == 0:
            lack = "rows" if facts else "`duollm` metadata"
            raise UserError(f"{path}: has no {lack}, so it is not a result; {again}")
        return cls(path, table, json.loads(facts), again)

    def fact(self, key: str) -> Any:
        """Return an entry of the metadata, or raise if it is missing."""
        if key not in self.facts:
            raise UserError(f"{self.path}: its metadata lacks {key!r}; {self.again}")
        return self.facts[key]

    def space(self) -> RouteSpace:
        """Return the route space to which the ids in this file belong."""
        return RouteSpace.from_facts({key: self.fact(key) for key in ("num_layers", "branches")} | self.facts)

    def has(self, name: str) -> bool:
        """Return whether there is such a column."""
        return name in self.table.column_names

    def _column(self, name: str) -> Any:
        if not self.has(name):
            raise UserError(f"{self.path}: column {name!r} is missing; {self.again}")
        return self.table.column(name)

    def floats(self, name: str) -> Floats:
        """Return a required column as float64."""
        return np.asarray(self._column(name).to_numpy(), dtype=np.float64)

    def integers(self, name: str) -> Integers:
        """Return a required column as int64."""
        return np.asarray(self._column(name).to_numpy(), dtype=np.int64)

    def strings(self, name: str) -> list[str]:
        """Return a required column as text."""
        return [str(value) for value in self._column(name).to_pylist()]

    def lists(self, name: str) -> list[list[Any]]:
        """Return a required column of lists, a list per row."""
        return list(self._column(name).to_pylist())

    def route_ids(self, name: str) -> Integers:
        """Return a column of route ids, all of which must be in the space."""
        ids = self.integers(name)
        size = self.space().size
        if ids.min() < 0 or ids.max() >= size:
            raise UserError(f"{self.path}: column {name!r} holds route ids outside 0 .. {size - 1}")
        return ids

    def documents(self) -> tuple[list[str], Integers]:
        """Return the names in order of first appearance, and each row's index into them."""
        encoded = self._column("document").chunk(0).dictionary_encode()
        return encoded.dictionary.to_pylist(), np.asarray(encoded.indices.to_numpy(), dtype=np.int64)
