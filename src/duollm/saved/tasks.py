"""lm-evaluation-harness tasks under policies: a table, `tasks.json` and the samples with their routes."""

import json
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from duollm.errors import UserError
from duollm.files import write_json, write_text
from duollm.machine import provenance
from duollm.saved.model import Saved
from duollm.terminal import Cell, print_table

Row = dict[str, Any]


@dataclass(frozen=True)
class TaskSettings:
    """Which tasks are run, and how.

    Attributes:
        tasks: names, as of `run_tasks`.
        include_path: further folders with task YAML files.
        limit: at most so many documents per task; None: all.
        num_fewshot: examples in the context; None: as the task says.
        batch_size: rows per forward; "auto": found by lm-eval on a GPU, 8 without one.
    """

    tasks: list[str]
    include_path: Sequence[str] = ()
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int | Literal["auto"] = 8


def score_tasks(
    saved: Saved, policies: Sequence[str], settings: TaskSettings, out: Path | None, command: list[str]
) -> None:
    """Run the tasks under each policy, print a table, and write files (docs/formats.md) if there is `out`.

    Args:
        policies: names; see `Saved.routed`.
        command: the command line, for the provenance.

    Raises:
        UserError: bad input, named in one line.
    """
    for name in ("lm_eval", "datasets", "huggingface_hub"):  # they say much that is no concern of ours
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        from duollm.measure.harness import RoutedLM, run_tasks
    except ModuleNotFoundError as error:
        raise UserError(f"tasks need {error.name}, which is not installed: pip install 'duollm[eval]'") from None
    rows: list[Row] = []
    samples: dict[str, list[Row]] = {}
    notes: list[str] = []
    batch_size, folders = settings.batch_size, [Path(folder) for folder in settings.include_path]
    if batch_size == "auto" and saved.model.device.type == "cpu":
        batch_size = 8  # lm-eval looks for the batch at which a GPU's memory ends; that of a CPU ends the process
        notes.append("batch size auto: 8 rows per forward, since there is no GPU whose memory could be measured")
    for name, model, policy in [saved.routed(name) for name in policies]:
        torch.manual_seed(0)  # tasks may sample
        lm = RoutedLM(model, saved.tokenizer, policy, batch_size)
        results = run_tasks(lm, settings.tasks, folders, settings.limit, settings.num_fewshot)
        cut = [f"{number} {what}" for what, number in lm.shortened.items() if number]
        notes += [f"{name}: cut to the model's {lm.max_length} positions: {', '.join(cut)}"] if cut else []
        big_share = {task: _big_share(of_task) for task, of_task in results["samples"].items()}
        rows += [{"policy": name, **row, "big_share": big_share.get(row["task"])} for row in _rows(results)]
        for task, of_task in results["samples"].items():
            samples.setdefault(task, []).extend({"policy": name, **sample} for sample in of_task)
    if out:
        _write(out, samples, {"provenance": provenance(command, 0), "notes": notes, "rows": rows})
    print_table(f"{saved.given}: tasks of lm-eval", _shown(rows))
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def _rows(results: dict[str, Any]) -> Iterator[Row]:
    """One row per task and metric, with lm-eval's standard error."""
    for task, metrics in results["results"].items():
        for key, value in metrics.items():
            metric, _, filtering = key.partition(",")
            if not filtering or metric.endswith("_stderr"):
                continue
            error = metrics.get(f"{metric}_stderr,{filtering}")
            yield {
                "task": task,
                "metric": metric if filtering == "none" else f"{metric}, {filtering}",
                "value": float(value),
                "stderr": error if isinstance(error, float) else None,
                "samples": results["n-samples"].get(task, {}).get("effective"),
            }


def _big_share(samples: Iterable[Row]) -> float | None:
    """Share of big over the layers of all scored tokens; None if no routes were kept."""
    digits = "".join(route for sample in samples for routes in sample["routes"] for route in routes or [])
    return digits.count("2") / len(digits) if digits else None


def _write(folder: Path, samples: dict[str, list[Row]], results: dict[str, Any]) -> None:
    from lm_eval.utils import handle_non_serializable

    for task, of_task in samples.items():
        lines = [json.dumps(sample, default=handle_non_serializable, ensure_ascii=False) for sample in of_task]
        write_text(folder / f"samples_{task}.jsonl", "\n".join(lines) + "\n")
    write_json(folder / "tasks.json", results)


def _shown(rows: Sequence[Row]) -> list[dict[str, Cell]]:
    """The policies of a task and metric one below the other."""
    in_order = sorted(rows, key=lambda row: (row["task"], row["metric"]))
    big = ["" if row["big_share"] is None else f"{row['big_share']:.1%}" for row in in_order]
    return [
        {"task": row["task"], "metric": row["metric"], "policy": row["policy"], "big": share}
        | {key: row[key] for key in ("value", "stderr", "samples")}
        for row, share in zip(in_order, big, strict=True)
    ]
