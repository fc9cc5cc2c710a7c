"""The oracle stage: search the test windows of every domain and store what was found as Parquet.

Windows are searched shard by shard; each shard is a file that exists only when it is whole, so a
killed run goes on with the first shard that is missing. At the end the shards of a domain are
joined. Formats: docs/formats.md.

Shape letters: W windows, T tokens, K budgets, G documents, R routes.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from duollm.config import OracleConfig
from duollm.data.packed import PackedData, Windows
from duollm.files import replacing
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.oracle.reduce import RouteSums
from duollm.oracle.result import OracleResult
from duollm.oracle.search import search_oracle
from duollm.routing.sampling import derived_seed
from duollm.routing.space import RouteSpace

_SHARD_WINDOWS = 8


@dataclass(frozen=True)
class OracleStore:
    """Where the search's results go and what they are results of.

    Attributes:
        folder: `<run>/oracle`.
        facts: written into every file's metadata: model and data fingerprints, space, context, budgets.
    """

    folder: Path
    facts: dict[str, Any]

    def shard(self, domain: str, number: int, kind: str) -> Path:
        """Path of one shard; kind is "tokens" or "routes"."""
        return self.folder / "shards" / f"{domain}-{number:05d}.{kind}.parquet"

    def write(self, path: Path, columns: dict[str, Any]) -> None:
        """Write columns as one Parquet file, atomically."""
        table = pa.table(columns).replace_schema_metadata({"duollm": json.dumps(self.facts)})
        with replacing(path) as temporary:
            pq.write_table(table, temporary, compression="zstd")

    def join(self, domain: str, shards: int) -> None:
        """Join the shards of a domain into its two files and remove them."""
        for kind, path in (
            ("routes", self.folder / f"{domain}.routes.parquet"),
            ("tokens", self.folder / f"{domain}.parquet"),
        ):
            parts = [self.shard(domain, number, kind) for number in range(shards)]
            joined = pa.concat_tables([pq.read_table(part) for part in parts])
            with replacing(path) as temporary:
                pq.write_table(joined, temporary, compression="zstd")
        for kind in ("tokens", "routes"):
            for number in range(shards):
                self.shard(domain, number, kind).unlink()


def run_oracle(
    model: DuoForCausalLM,
    data: PackedData,
    config: OracleConfig,
    seed: int,
    folder: Path,
    facts: dict[str, Any],
    report: Callable[[str], None] = print,
) -> None:
    """Search the test windows of every domain and write `folder/<domain>.parquet` and `.routes.parquet`.

    Args:
        facts: fingerprints and version, for the files' metadata.
        report: is told progress, a line at a time.
    """
    search = _Search(model, RouteSpace(model.config.num_hidden_layers), data, config)
    store = OracleStore(folder, facts | search.facts())
    for domain in data.domains:
        if (folder / f"{domain}.parquet").exists():
            continue
        windows = data.windows("test", domain, config.documents, config.windows_per_document, seed)
        shards = list(_shards(windows))
        clock = _Clock(f"oracle {domain}", sum(part.token_ids[:, 1:].size for part in shards), report)
        for number, part in enumerate(shards):
            if not store.shard(domain, number, "tokens").exists():
                tokens, routes = search.shard(part, derived_seed(seed, number))
                store.write(store.shard(domain, number, "routes"), routes)
                store.write(store.shard(domain, number, "tokens"), tokens)
            clock.tick(part.token_ids[:, 1:].size)
        store.join(domain, len(shards))


@dataclass(frozen=True)
class _Search:
    """What all shards of a run have in common."""

    model: DuoForCausalLM
    space: RouteSpace
    data: PackedData
    config: OracleConfig

    @property
    def budgets(self) -> list[int]:
        """The recipe's budgets, and all small and all big, which every result is compared with."""
        layers = self.space.num_layers
        wanted = range(layers + 1) if self.config.big_layers is None else self.config.big_layers
        return sorted({0, layers, *wanted})

    def facts(self) -> dict[str, Any]:
        """What the files' metadata says of the search."""
        return {
            "num_layers": self.space.num_layers,
            "branches": [branch.name.lower() for branch in self.space.branches],
            "context": "shared",
            "big_layers": self.budgets,
            "sequence_length": self.data.sequence_length,
            "random_routes": self.config.random_routes,
        }

    def shard(self, windows: Windows, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Search a shard; return the columns of its tokens file and of its routes file."""
        device = self.model.device
        generator = torch.Generator(device).manual_seed(seed)
        documents = sorted(set(windows.documents))
        sums_GR = torch.zeros(len(documents), self.space.size, dtype=torch.float64, device=device)
        found = []
        for token_ids_T, document in zip(windows.token_ids, windows.documents, strict=True):
            group_N = torch.full((len(token_ids_T) - 1,), documents.index(document), device=device)
            result = search_oracle(
                self.model,
                torch.from_numpy(token_ids_T)[None].to(device),
                self.space,
                big_layers=self.budgets,
                random_routes=self.config.random_routes,
                generator=generator,
                sums=RouteSums(group_N, sums_GR),
                memory_bytes=int(self.config.memory_gib * 2**30),
            )
            found.append(result)
        tokens = self._token_columns(windows, found)
        tokens_G = np.array([windows.documents.count(document) for document in documents]) * (len(token_ids_T) - 1)
        return tokens, _route_columns(documents, sums_GR.cpu().numpy(), tokens_G)

    def _token_columns(self, windows: Windows, found: list[OracleResult]) -> dict[str, Any]:
        predicted = windows.token_ids.shape[1] - 1
        token_ids = windows.token_ids[:, 1:].flatten()
        nll_KN, ids_KN, random_KN = (
            torch.cat([getattr(result, name)[:, 0] for result in found], dim=1).cpu().numpy()
            for name in ("nll", "route_ids", "random_nll")
        )
        columns = {
            "document": np.repeat(windows.documents, predicted),
            "window": np.repeat(np.asarray(windows.window, dtype=np.int32), predicted),
            "position": np.tile(np.arange(1, predicted + 1, dtype=np.int32), len(windows.window)),
            "token_id": token_ids.astype(np.int32),
            "text": self.data.tokenizer.batch_decode(token_ids[:, None].tolist()),
            "nll_small": nll_KN[self.budgets.index(0)],
            "nll_big": nll_KN[self.budgets.index(self.space.num_layers)],
        }
        for index, big in enumerate(self.budgets):
            columns[f"nll_shared_k{big}"] = nll_KN[index]
            columns[f"route_shared_k{big}"] = ids_KN[index]
            columns[f"nll_random{self.config.random_routes}_k{big}"] = random_KN[index]
        return columns


def _route_columns(documents: list[str], sums_GR: NDArray[np.float64], tokens_G: NDArray[np.int64]) -> dict[str, Any]:
    routes = sums_GR.shape[1]
    return {
        "document": np.repeat(documents, routes),
        "route": np.tile(np.arange(routes), len(documents)),
        "nll_sum": sums_GR.flatten(),
        "tokens": np.repeat(tokens_G.astype(np.int32), routes),
    }


def _shards(windows: Windows) -> Iterator[Windows]:
    """Cut the windows into shards of whole documents, about `_SHARD_WINDOWS` windows each."""
    start = 0
    for end in range(1, len(windows.window) + 1):
        whole = end == len(windows.window) or windows.documents[end] != windows.documents[end - 1]
        if whole and (end - start >= _SHARD_WINDOWS or end == len(windows.window)):
            yield Windows(windows.token_ids[start:end], windows.documents[start:end], windows.window[start:end])
            start = end


class _Clock:
    """Reports rate and time left after every shard."""

    def __init__(self, name: str, tokens: int, report: Callable[[str], None]) -> None:
        self.name, self.tokens, self.report = name, tokens, report
        self.done, self.started = 0, time.perf_counter()

    def tick(self, tokens: int) -> None:
        """Note that so many more tokens are done."""
        self.done += tokens
        rate = self.done / (time.perf_counter() - self.started)
        left = (self.tokens - self.done) / rate
        self.report(
            f"{self.name}  token {self.done:,}/{self.tokens:,}  {rate:,.1f} tokens/s  "
            f"ETA {int(left // 60)}:{int(left % 60):02d}"
        )
