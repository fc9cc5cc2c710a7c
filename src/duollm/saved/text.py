"""Losses, routes, cost and speed of text under policies: a table, `evaluation.json` and a row per token.

Shape letters: W windows, T tokens, L layers, J policies, X draws of the bootstrap.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import exp, isfinite
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from duollm.data.packed import PackedData, Windows
from duollm.data.packing import prepare_data
from duollm.data.tokenizer import check_vocabulary
from duollm.files import replacing, write_json
from duollm.flops import mean_token_flops
from duollm.machine import provenance
from duollm.measure.executor import branch_shares, deciding_flops, policy_losses, route_digits
from duollm.models.branch import Branch
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.records.bootstrap import interval, mean_draws
from duollm.saved.model import Routed, Saved
from duollm.terminal import Cell, print_table

Row = dict[str, Any]


@dataclass(frozen=True)
class TextSettings:
    """What text of the test split is scored, and how.

    Attributes:
        domains: default: those of the run, or of a recipe without a run.
        documents, windows: at most so many documents per domain, and windows per document.
        sequence_length: tokens per window; default: that of the run, or of a recipe without a run.
        batch_size: windows per forward.
    """

    domains: list[str] | None = None
    documents: int = 40
    windows: int = 4
    sequence_length: int | None = None
    batch_size: int = 8


@dataclass(frozen=True)
class Scored:
    """One policy on one domain.

    Attributes:
        columns: `Windows.columns()`, and of every predicted token `nll` (nats) and `route`, the digits of
            the route of the token that predicts it ("112": big in the last of three layers).
        big_share: big among all (token, layer).
        relative_flops: forward FLOPs per token, output head and a router's own included, over those of all big.
        tokens_per_second: speed of scoring.
    """

    policy: str
    columns: dict[str, NDArray[Any]]
    big_share: float
    relative_flops: float
    tokens_per_second: float


def score_text(
    saved: Saved, policies: Sequence[str], settings: TextSettings, out: Path | None, command: list[str]
) -> None:
    """Score each domain under each policy, print a table, and write files (docs/formats.md) if there is `out`.

    Args:
        policies: names; see `Saved.routed`.
        command: the command line, for the provenance.

    Raises:
        UserError: bad input, named in one line.
    """
    routed = [saved.routed(name) for name in policies]
    with held_out_text(saved, settings) as (data, domains):
        check_vocabulary(str(saved.folder), saved.model.config.vocab_size, data.vocab_size)
        scored = {}
        for domain in domains:
            windows = data.windows("test", domain, settings.documents, settings.windows, saved.seed)
            scored[domain] = list(score(routed, windows, settings.batch_size))
        facts = {"sequence_length": data.sequence_length, "data_fingerprint": data.fingerprint}
    rows = [row for domain, of_policies in scored.items() for row in _rows(domain, of_policies, saved.seed)]
    if out:
        _write(out, scored, {"provenance": provenance(command, saved.seed), **facts, "rows": rows})
    print_table(f"{saved.given}: windows of {data.sequence_length} tokens of the test split", _shown(rows))


def score(routed: Sequence[Routed], windows: Windows, batch_size: int) -> Iterator[Scored]:
    """Run the windows through every model under its policy."""
    warm = None
    for name, model, policy in routed:
        token_ids_WT = torch.from_numpy(windows.token_ids).to(model.device)
        if model is not warm:
            policy_losses(model, token_ids_WT[:batch_size], policy=policy)  # a model's first run allocates; not timed
            warm = model
        start = time.perf_counter()
        nll_WT, routes_WTL = policy_losses(model, token_ids_WT, policy=policy, batch_size=batch_size)
        nll = nll_WT.flatten().cpu().numpy()  # waits for the device
        seconds = time.perf_counter() - start
        columns = windows.columns() | {"nll": nll, "route": route_digits(routes_WTL.flatten(0, 1))}
        shares = branch_shares(routes_WTL)
        flops = relative_flops(model, shares, windows.token_ids.shape[1], deciding_flops(policy))
        yield Scored(name, columns, shares[Branch.BIG], flops, token_ids_WT.numel() / seconds)


def relative_flops(
    model: DuoForCausalLM, shares: tuple[float, float, float], sequence_length: int, deciding: int = 0
) -> float:
    """Forward FLOPs with these shares of (skip, small, big), and `deciding` ones per token, over those of all big."""
    all_big = mean_token_flops(model.config, (0, 0, 1), sequence_length)
    return (mean_token_flops(model.config, shares, sequence_length) + deciding) / all_big


@contextmanager
def held_out_text(saved: Saved, settings: TextSettings) -> Iterator[tuple[PackedData, list[str]]]:
    """The test split and the domains to score: the run's own data if it has them, else tokenized for the occasion."""
    length = settings.sequence_length or saved.data.sequence_length
    asked = settings.domains
    if saved.run and (saved.run / "data" / "manifest.json").is_file():
        data = PackedData.open(saved.run / "data")
        if set(asked or []) <= set(data.domains):
            yield replace(data, manifest={**data.manifest, "sequence_length": length}), asked or data.domains
            return
    with TemporaryDirectory() as folder:
        tokenizer = str(Path(folder, "tokenizer"))
        saved.tokenizer.save_pretrained(tokenizer)
        update = {"domains": asked or saved.data.domains, "tokenizer": tokenizer, "sequence_length": length}
        data = prepare_data(saved.data.model_copy(update=update), saved.seed, Path(folder, "data"), only=["test"])
        yield data, data.domains


def _rows(domain: str, scored: Sequence[Scored], seed: int) -> Iterator[Row]:
    """One row of results per policy, with intervals over documents; docs/formats.md."""
    documents = scored[0].columns["document"]
    draws_XJ = mean_draws(documents, np.stack([each.columns["nll"] for each in scored], -1).astype(float), seed)
    all_big = next((column for column, each in enumerate(scored) if each.big_share == 1), None)
    for column, each in enumerate(scored):
        nll = interval(draws_XJ[:, column])
        over_big = None if all_big is None else interval(draws_XJ[:, column] - draws_XJ[:, all_big])
        yield {
            "domain": domain,
            "policy": each.policy,
            "nll": nll.value,
            "low": _known(nll.low),
            "high": _known(nll.high),
            "perplexity": exp(nll.value),
            "over_all_big": over_big.value if over_big else None,
            "over_all_big_low": _known(over_big.low) if over_big else None,
            "over_all_big_high": _known(over_big.high) if over_big else None,
            "big_share": each.big_share,
            "relative_flops": each.relative_flops,
            "tokens_per_second": each.tokens_per_second,
            "documents": len(set(documents)),
            "tokens": len(documents),
        }


def _known(value: float) -> float | None:
    return value if isfinite(value) else None


def _shown(rows: Sequence[Row]) -> list[dict[str, Cell]]:
    """What fits a line of the terminal."""
    return [
        {
            "domain": row["domain"],
            "policy": row["policy"],
            "nll": f"{row['nll']:.3f}",
            "95 %": "" if row["low"] is None else f"{row['low']:.3f} .. {row['high']:.3f}",
            "over all big": _signed(row["over_all_big"], row["over_all_big_low"], row["over_all_big_high"]),
            "perplexity": row["perplexity"],
            "big": f"{row['big_share']:.1%}",
            "FLOPs": f"{row['relative_flops']:.1%}",
            "tokens/s": row["tokens_per_second"],
            "documents": row["documents"],
        }
        for row in rows
    ]


def _signed(value: float | None, low: float | None, high: float | None) -> str:
    if value is None:
        return ""
    return f"{value:+.3f}" if low is None else f"{value:+.3f} ({low:+.3f} .. {high:+.3f})"


def _write(folder: Path, scored: dict[str, list[Scored]], results: dict[str, Any]) -> None:
    """Write `evaluation.json`, and `<domain>.parquet` with a row per policy and predicted token."""
    for domain, of_policies in scored.items():
        tables = [
            pa.table({"policy": [each.policy] * len(each.columns["nll"]), **each.columns}) for each in of_policies
        ]
        with replacing(folder / f"{domain}.parquet") as temporary:
            pq.write_table(pa.concat_tables(tables), temporary, compression="zstd")
    write_json(folder / "evaluation.json", results)
