"""One parquet file of a run as checked columns: a file that is missing or foreign is refused in a line."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from duollm.analysis.statistics import Floats, Integers
from duollm.errors import UserError
from duollm.routes.space import RouteSpace, parse_branches


@dataclass(frozen=True)
class ResultFile:
    """One parquet file with the facts that duollm keeps in its schema."""

    path: Path
    table: Any
    facts: dict[str, Any]
    again: str
    """How to mend it."""

    @classmethod
    def open(cls, path: Path, made_by: str, folder: Path) -> "ResultFile":
        """Read a file that the command `made_by` writes; as long as `folder` is there, it takes its work for done.

        Raises:
            UserError: it is missing or is no result of duollm.
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
        """Return an entry of the metadata, which must be there."""
        if key not in self.facts:
            raise UserError(f"{self.path}: its metadata lacks {key!r}; {self.again}")
        return self.facts[key]

    def space(self) -> RouteSpace:
        """Return the routes that ids in this file stand for."""
        return RouteSpace(self.fact("num_layers"), parse_branches(self.fact("branches")))

    @property
    def names(self) -> list[str]:
        """Names of all columns."""
        return list(self.table.column_names)

    def has(self, name: str) -> bool:
        """Whether there is such a column."""
        return name in self.table.column_names

    def _column(self, name: str) -> Any:
        if not self.has(name):
            raise UserError(f"{self.path}: column {name!r} is missing; {self.again}")
        return self.table.column(name)

    def floats(self, name: str) -> Floats:
        """Return a column that must be there, as float64."""
        return np.asarray(self._column(name).to_numpy(), dtype=np.float64)

    def integers(self, name: str) -> Integers:
        """Return a column that must be there, as int64."""
        return np.asarray(self._column(name).to_numpy(), dtype=np.int64)

    def strings(self, name: str) -> list[str]:
        """Return a column that must be there, as text."""
        return [str(value) for value in self._column(name).to_pylist()]

    def route_ids(self, name: str) -> Integers:
        """Return a column of ids of routes, all of which must be in the space."""
        ids = self.integers(name)
        size = self.space().size
        if ids.min() < 0 or ids.max() >= size:
            raise UserError(f"{self.path}: column {name!r} holds route ids outside 0 .. {size - 1}")
        return ids

    def documents(self) -> tuple[list[str], Integers]:
        """Return the names in order of first appearance, and each row's index into them."""
        encoded = self._column("document").chunk(0).dictionary_encode()
        return encoded.dictionary.to_pylist(), np.asarray(encoded.indices.to_numpy(), dtype=np.int64)
