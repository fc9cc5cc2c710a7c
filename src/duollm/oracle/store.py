"""The oracle's store: shards while it runs, three Parquet files per domain when it is complete.

Formats: docs/formats.md. A shard is a file that exists only when it is complete, so a killed run continues with the
missing shards. The manifest says from which model, data and search the results come.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from duollm.errors import UserError, in_a_line
from duollm.files import read_json, write_json
from duollm.records.files import KINDS, write_result

Columns = dict[str, Any]


@dataclass(frozen=True)
class OracleStore:
    """A folder of results of one model, data set and search.

    Attributes:
        folder: `<run>/oracle`.
        facts: everything that the results depend on. It goes into the manifest and into the metadata of every file.
    """

    folder: Path
    facts: dict[str, Any]

    def claim(self) -> None:
        """Write the manifest, or check that the existing one is the same.

        Raises:
            UserError: the folder holds results of another model, data set or search.
        """
        path = self.folder / "manifest.json"
        if not path.exists():
            write_json(path, self.facts)
            return
        try:
            found = dict(read_json(path))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path}: damaged ({in_a_line(error)}); delete the folder {self.folder}") from None
        for key, value in self.facts.items():
            if found.get(key) != value:
                raise UserError(
                    f"{self.folder}: holds results with {key} {found.get(key)!r}, this search has {value!r}; "
                    "give another run folder, or delete this one"
                )

    def path(self, domain: str, kind: str = "tokens") -> Path:
        """Return the path of one of a domain's files; `kind` is one of `KINDS`."""
        return self.folder / f"{domain}{KINDS[kind]}.parquet"

    def has_shard(self, domain: str, number: int) -> bool:
        """Return whether a shard is complete."""
        return all(self._shard(domain, number, kind).exists() for kind in KINDS)

    def write_shard(self, domain: str, number: int, columns: dict[str, Columns]) -> None:
        """Write a shard's rows, by kind of file."""
        for kind, values in columns.items():
            write_result(self._shard(domain, number, kind), values, self.facts)

    def read_shards(self, domain: str, shards: int) -> dict[str, pa.Table]:
        """Read the rows of all shards in order, by kind of file."""
        return {
            kind: pa.concat_tables([pq.read_table(self._shard(domain, number, kind)) for number in range(shards)])
            for kind in KINDS
        }

    def complete(self, domain: str, shards: int, tables: dict[str, pa.Table]) -> None:
        """Write the files of a domain and remove its shards. The token file comes last, because it marks completion."""
        for kind in reversed(KINDS):
            write_result(self.path(domain, kind), tables[kind], self.facts)
        for number in range(shards):
            for kind in KINDS:
                self._shard(domain, number, kind).unlink()

    def _shard(self, domain: str, number: int, kind: str) -> Path:
        return self.folder / "shards" / f"{domain}-{number:05d}{KINDS[kind]}.parquet"
