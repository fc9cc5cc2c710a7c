"""Losses of text under policies: a table, `evaluation.json` and a row per token.

Shape letters: T tokens, P policies, X draws of the bootstrap.
"""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import exp, isfinite
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from duollm.data.packed import PackedData
from duollm.data.packing import prepare_data
from duollm.data.tokenizer import check_vocabulary
from duollm.files import replacing, write_json
from duollm.machine import provenance
from duollm.measure.scoring import Scored, score
from duollm.records.bootstrap import interval, mean_draws
from duollm.standalone.saved import Saved, policies_of
from duollm.terminal import Cell, print_table

Row = dict[str, Any]


def evaluate_text(options: Namespace, command: list[str]) -> None:
    """Score each domain under each policy; see `duollm.standalone.evaluate`."""
    saved = Saved.at(Path(options.saved))
    routed = [saved.routed(name) for name in policies_of(options, saved.model)]
    with _test_text(saved, options) as (data, domains):
        check_vocabulary(f"--model {saved.folder}", saved.model.config.vocab_size, data.vocab_size)
        scored = {}
        for domain in domains:
            windows = data.windows("test", domain, options.documents, options.windows, saved.seed)
            scored[domain] = list(score(routed, windows, options.batch_size))
        facts = {"sequence_length": data.sequence_length, "data_fingerprint": data.fingerprint}
    rows = [row for domain, of_policies in scored.items() for row in _rows(domain, of_policies, saved.seed)]
    if options.out:
        _write(Path(options.out), scored, {"provenance": provenance(command, saved.seed), **facts, "rows": rows})
    print_table(f"{options.saved}: windows of {data.sequence_length} tokens of the test split", _shown(rows))


@contextmanager
def _test_text(saved: Saved, options: Namespace) -> Iterator[tuple[PackedData, list[str]]]:
    """The test split and the domains to score: the run's own data if it has them, else tokenized for the occasion."""
    length = options.sequence_length or saved.data.sequence_length
    asked = options.domains.split(",") if options.domains else None
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
    draws_XP = mean_draws(documents, np.stack([each.columns["nll"] for each in scored], -1).astype(float), seed)
    all_big = next((column for column, each in enumerate(scored) if each.big_share == 1), None)
    for column, each in enumerate(scored):
        nll = interval(draws_XP[:, column])
        over_big = None if all_big is None else interval(draws_XP[:, column] - draws_XP[:, all_big])
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
