"""`duollm evaluate --model FOLDER`: one saved model without a study. The work is imported only when it is done."""

import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from duollm.errors import UserError
from duollm.files import check_folder
from duollm.options import names, whole_number

TEXT_FLAGS = ("--domains", "--documents", "--windows", "--sequence-length")
TASK_FLAGS = ("--limit", "--num-fewshot", "--include-path")
FLAGS = ("--policy", "--sweep", "--shares", "--batch-size", "--tasks", *TEXT_FLAGS, *TASK_FLAGS)
"""All that needs --model."""


def add_options(parser: ArgumentParser) -> None:
    """Add the options of a standalone evaluation, each group with a line on what it is for."""
    add = parser.add_argument_group("a saved model instead of a recipe", "--out is then where results go.").add_argument
    add("--model", dest="saved", metavar="FOLDER", help="a saved duo, or a run folder")
    add(
        "--policy",
        action="append",
        metavar="SPEC",
        help="all-big (default), random:0.25, a router's folder, ...; repeat",
    )
    add("--sweep", metavar="KIND", help="in place of --policy: spread, random, first or last at several shares of big")
    add("--shares", default="0,0.25,0.5,0.75,1", metavar="LIST", help="shares of big to sweep (default: %(default)s)")
    add(
        "--batch-size",
        type=_rows,
        default=8,
        metavar="N",
        help="rows per forward, or auto for tasks (default: %(default)s)",
    )
    add = parser.add_argument_group("losses of text", "Of the test split of each domain.").add_argument
    add(
        "--domains",
        type=names,
        metavar="LIST",
        help="prose, code, a file or folder, ... (default: the run's, else prose,code)",
    )
    add("--documents", type=whole_number(), default=40, metavar="N", help="documents per domain (default: %(default)s)")
    add("--windows", type=whole_number(), default=4, metavar="N", help="windows per document (default: %(default)s)")
    add("--sequence-length", type=whole_number(2), metavar="T", help="tokens per window (default: the run's, else 128)")
    add = parser.add_argument_group("tasks of lm-eval in place of losses", "Need the extra `eval`.").add_argument
    add(
        "--tasks", type=names, metavar="LIST", help="duollm_prose_continuation, duollm_code_continuation, arc_easy, ..."
    )
    add("--limit", type=whole_number(), metavar="N", help="documents per task (default: all)")
    add("--num-fewshot", type=whole_number(0), metavar="N", help="examples in the context (default: the task's)")
    add("--include-path", action="append", metavar="FOLDER", help="a folder with task YAML files; repeat")


def check_mix(given: Iterable[str], batch_size: int | str) -> None:
    """Refuse options that do not belong together; `given` are the flags on the command line.

    Raises:
        UserError: names both.
    """
    given = set(given)
    misplaced = TEXT_FLAGS if "--tasks" in given else TASK_FLAGS
    for flag in misplaced:
        if flag in given:
            fault = "is about losses of text; leave it out, or --tasks" if "--tasks" in given else "needs --tasks"
            raise UserError(f"{flag} {fault}")
    if batch_size == "auto" and "--tasks" not in given:
        raise UserError("--batch-size auto goes with --tasks; losses of text take a whole number from 1")
    if {"--policy", "--sweep"} <= given:
        raise UserError("give --policy or --sweep, not both; a sweep makes its own policies")
    if "--shares" in given and "--sweep" not in given:
        raise UserError("--shares needs --sweep: spread, random, first or last")


def evaluate(options: Namespace, command: list[str]) -> None:
    """Score text, or run tasks, as the options say; print a table, and write files if there is --out.

    Raises:
        UserError: bad input, named in one line.
    """
    if options.out:
        check_folder("--out", Path(options.out))
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported
    if options.tasks:
        if not _hub_answers():
            os.environ["HF_HUB_OFFLINE"] = "1"  # read at import; without it every file is retried for half a minute
        from duollm.standalone.tasks import evaluate_tasks

        evaluate_tasks(options, command)
    else:
        from duollm.standalone.text import evaluate_text

        evaluate_text(options, command)


def _hub_answers() -> bool:
    """Whether the Hugging Face hub can be reached, with proxies as the environment sets them."""
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urlopen(Request(hub, method="HEAD"), timeout=5).close()
    except HTTPError:  # an answer too
        return True
    except (OSError, ValueError):
        return False
    return True


def _rows(text: str) -> int | str:
    """A number of rows, or auto."""
    return text if text == "auto" else whole_number()(text)
