"""C14 and C15: the duo against models that were trained otherwise, all scored on the same text (paper, figure 8).

Shape letters: X draws of the bootstrap, P models, T tokens, I items of a task.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from duollm.analysis.verdicts import DIFFERENCE, Claim, condition, decide
from duollm.errors import UserError
from duollm.records.bootstrap import Floats, percent, stratified_draws, with_interval

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of big at which the paper compares the duo with dense models of equal FLOPs."""
NEAR_DENSE = 0.1
"""C14: nats per token by which the duo may be worse than a dense model of equal FLOPs."""
NEAR_ACCURACY = 0.05
"""C14 by tasks: the share of items by which the duo may fall behind."""
BY_TASKS = "tasks"
"""In place of a domain: what a claim by accuracy on tasks is about."""
FOLDER = "score"
"""Where in a run folder its scores are: the folder that `duollm score RUN --out RUN/score` writes."""
TASKS = ("duollm_prose_continuation", "duollm_code_continuation")
"""C14: the tasks that come with the installation (`duollm score --tasks`)."""
_C14 = "Duos are near dense models of equal FLOPs when mostly big, and below them when small only"
_TOKEN = ["document", "window", "position", "token_id"]


def model_claims(
    domain: str, over_dense_X: Mapping[float, Floats] | None = None, frozen_X: Floats | None = None
) -> list[Claim]:
    """Decide C14 and C15.

    Args:
        over_dense_X: nll of the duo at a share of big minus that of the dense model of equal FLOPs.
        frozen_X: nll of the duo whose big FFNs were trained first and frozen, minus that of the other; share .5.
    """
    over = over_dense_X or {}
    quantity = "nll: duo - dense of equal FLOPs, at big share "
    mostly = [condition(f"{quantity}{share:g}", over.get(share), below=NEAR_DENSE) for share in (0.75, 1.0)]
    small = condition(f"{quantity}0", over.get(0.0), above=0)
    shown = [condition(f"{share:g}", over.get(share), above=0) for share in SHARES if share in over]
    found = "; ".join(f"at {one.quantity} {with_interval(one.estimate)}" for one in shown)
    frozen = condition("nll: big trained first and frozen - both trained, at big share 0.5", frozen_X, above=0)
    c15 = "Training big alone, freezing it, and then training small is worse than training both"
    return [
        decide("C14", domain, _C14, f"Nats above the dense model: {found}.", *mostly, small),
        decide(
            "C15", domain, c15, f"Freezing costs {with_interval(frozen.estimate)} nats at a big share of 0.5.", frozen
        ),
    ]


def task_claim(behind_X: Mapping[float, Floats]) -> Claim:
    """Decide C14 by accuracy on tasks, as the paper does.

    Args:
        behind_X: accuracy of the dense model of equal FLOPs minus that of the duo at a share of big.
    """
    quantity = "accuracy: dense of equal FLOPs - duo, at big share "
    mostly = [
        condition(f"{quantity}{share:g}", behind_X.get(share), below=NEAR_ACCURACY, possible=DIFFERENCE)
        for share in (0.75, 1.0)
    ]
    small = condition(f"{quantity}0", behind_X.get(0.0), above=0, possible=DIFFERENCE)
    shown = [
        condition(f"{share:g}", behind_X[share], above=0, possible=DIFFERENCE) for share in SHARES if share in behind_X
    ]
    found = "; ".join(f"at {one.quantity} {with_interval(one.estimate, percent)}" for one in shown)
    return decide("C14", BY_TASKS, f"{_C14}, by tasks", f"Accuracy of dense above the duo: {found}.", *mostly, small)


def task_draws(pairs: Sequence[tuple[Path, str]], seed: int) -> Floats | None:
    """Return the accuracy [X, P] of policies of runs on all items together, on the same resamples of documents.

    An item that does not say from which document it is (`document`) stands for itself.

    Args:
        pairs: P times a run folder and the policy that it was scored under.

    Returns:
        None if there is no task of which all runs have items.

    Raises:
        UserError: the runs were scored on other items.
    """
    tasks = []
    for task in sorted(path.name for path in (pairs[0][0] / FOLDER).glob("samples_*.jsonl")):
        found = [_items(run / FOLDER / task, policy) for run, policy in pairs]
        if not all(found):
            continue
        for (run, _), items in zip(pairs, found, strict=True):
            if items.keys() != found[0].keys():
                raise UserError(f"{run / FOLDER / task}: other items than of {pairs[0][0]}; score both alike")
        right_IP = np.array([[items[name][1] for items in found] for name in found[0]])
        tasks.append(([document for document, _ in found[0].values()], right_IP))
    return stratified_draws(tasks, seed) if tasks else None


def _items(path: Path, policy: str) -> dict[str, tuple[str, float]]:
    """Read a policy's items: by their hash, the document and whether the answer was right."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
        return {
            each["doc_hash"]: (str(each["doc"].get("document", each["doc_hash"])), float(each["acc"]))
            for each in lines
            if each["policy"] == policy and "acc" in each
        }
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not samples that `duollm score` writes of a task ({error})") from None


def scored_domains(run: Path) -> list[str]:
    """Return the domains that were scored, by name; none if the run was not scored."""
    return sorted(file.stem for file in (run / FOLDER).glob("*.parquet"))


def scored_size(run: Path) -> str:
    """Say how much text a run was scored on, and how many items of tasks."""
    files = [run / FOLDER / f"{domain}.parquet" for domain in scored_domains(run)]
    tables = [pq.read_table(file, columns=_TOKEN[:3]).group_by(_TOKEN[:3]).aggregate([]) for file in files]
    tokens = sum(table.num_rows for table in tables)
    documents = sum(len(table.column("document").unique()) for table in tables)
    items = 0
    for path in (run / FOLDER).glob("samples_*.jsonl"):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        items += len({each["doc_hash"] for each in lines if "acc" in each})
    return f"{tokens:,} tokens of {documents:,} documents" + (f", {items:,} items of tasks" if items else "")


def paired_draws(domains: Sequence[str], pairs: Sequence[tuple[Path, str]], seed: int) -> Floats | None:
    """Return the mean nll [X, P] of policies of runs, on the same resamples of the documents of all domains together.

    Args:
        pairs: P times a run folder and the policy that it was scored under.

    Returns:
        None if a run was not scored under its policy on one of the domains.

    Raises:
        UserError: the runs were scored on other text.
    """
    strata = []
    for domain in domains:
        found = [_losses(run / FOLDER / f"{domain}.parquet", policy) for run, policy in pairs]
        tables = [table for table in found if table is not None]
        if len(tables) < len(pairs):
            return None
        first = tables[0]
        for table, (run, _) in zip(tables, pairs, strict=True):
            if not table.select(_TOKEN).equals(first.select(_TOKEN)):
                raise UserError(
                    f"{run / FOLDER}: scored on other text than {pairs[0][0] / FOLDER}; give runs of the same data and "
                    "seed, and score them with the same options"
                )
        nll_TP = np.stack([table.column("nll").to_numpy() for table in tables], axis=1).astype(np.float64)
        strata.append((first.column("document").to_pylist(), nll_TP))
    return stratified_draws(strata, seed) if strata else None


def _losses(path: Path, policy: str) -> pa.Table | None:
    """Read the rows of a policy, in order of document, window and position; None if it was not scored."""
    if not path.exists():
        return None
    try:
        table = pq.read_table(path, columns=[*_TOKEN, "nll"], filters=[("policy", "==", policy)])
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not what `duollm score` writes ({str(error).splitlines()[0]})") from None
    return table.sort_by([(name, "ascending") for name in _TOKEN[:3]]).combine_chunks() if table.num_rows else None
