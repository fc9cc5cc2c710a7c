"""Decides every claim of docs/claims.md: three seeds of the reference study, then small runs that some claims need.

    ./run reference [--out runs/claims] [--seeds 0 1 2] [--dry-run]

It runs `duollm` again and again, and prints each command. Finished work is not repeated and killed work continues, so
the same command goes on where it stopped. Several processes can share the work, each with some of the seeds: one thread
each is faster than two threads in turn.
"""

import argparse
import importlib.util
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import NamedTuple

from duollm.analysis.claims.models import FOLDER, SHARES, TASKS
from duollm.config import Recipe
from duollm.errors import UserError
from duollm.files import write_text
from duollm.recipe_files import load_recipe
from duollm.routes.space import focus_budgets

RECIPES = Path(__file__).parents[1] / "recipes"
BIG_SHARE_OF_TOKENS = 2 / 3
"""C15: of the tokens, so many train big alone, as in the paper (200 B of 300 B)."""


class Run(NamedTuple):
    """A run folder, the verb and settings that make it, and how it is scored: options of `duollm score`, if it is."""

    name: str
    verb: str
    settings: dict[str, object]
    score: Sequence[str] = ()
    tasks: bool = True


def dense_widths(recipe: Recipe) -> dict[float, int]:
    """Return the widths of the FFNs of dense models that take the FLOPs of the duo, by its share of big."""
    small, big = recipe.model.small_intermediate_size, recipe.model.intermediate_size
    return {share: round(small + share * (big - small)) for share in SHARES}


def runs_beside(recipe: Recipe, folder: Path, model: Path | None) -> Iterator[Run]:
    """Yield a study of `recipe` and the runs that claims need beside it, each after those that it builds on.

    Args:
        folder: where the runs are.
        model: a run whose model the routers that may skip are trained on; None: each trains a model that skips.
    """
    budgets = sorted(set(focus_budgets(recipe.model.num_hidden_layers)))
    study = {"router.kinds": ["linear"], "router.big_layers": budgets, "ceiling.enabled": False}
    # What measures routers only searches as little as it can.
    routers = study | {"oracle.search": "sampled", "oracle.documents": 2, "oracle.random_routes": 2}
    routers |= {"oracle.resampled_labels": 0}
    yield Run("study", "study", study, ["--sweep", "random"])
    yield Run("skip", "study", study | _skipping("skip", "big", model=model))
    yield Run("skip-layers", "study", study | _skipping("skip", "big") | {"model.skip_scope": "layer"})
    yield Run("skip-small", "study", routers | _skipping("skip", "small", "big", model=model))
    three = routers | _skipping("skip", "small", "big")
    three = routers | _skipping("skip", "small", "big") | {"model.skip_scope": "layer"}
    yield Run("skip-small-layers", "study", three)
    yield Run("opt", "study", routers | {"model.architecture": "opt"})
    opt = folder / "opt" if model else None
    yield Run(
        "opt-skip", "study", routers | _skipping("skip", "small", "big", model=opt) | {"model.architecture": "opt"}
    )
    alone: dict[str, object] = {"pretrain.branch_shares": [0, 0, 1]}
    for share, width in dense_widths(recipe).items():
        width_of = {"model.intermediate_size": width}
        yield Run(f"dense-{share:g}", "pretrain", alone | width_of, ["--policy", "all-big"])
    first = round(BIG_SHARE_OF_TOKENS * recipe.pretrain.tokens)
    yield Run("big", "pretrain", alone | {"pretrain.tokens": first})
    frozen = {"model.dense": folder / "big" / "model", "convert.small_init": "random", "pretrain.freeze": "big"}
    frozen |= {"pretrain.tokens": recipe.pretrain.tokens - first}
    yield Run("frozen", "pretrain", frozen, ["--policy", "random:0.5"], tasks=False)


def _skipping(*branches: str, model: Path | None = None) -> dict[str, object]:
    settings: dict[str, object] = {"oracle.branches": list(branches), "router.branches": list(branches)}
    if model:
        return settings | {"model.path": model / "model", "data.tokenizer": model / "data" / "tokenizer"}
    shares = [1 / len(branches) if branch in branches else 0 for branch in ("skip", "small", "big")]
    return settings | {"pretrain.branch_shares": shares}


def duollm(arguments: Sequence[str]) -> None:
    """Run one command of duollm; stop here if it fails."""
    code = subprocess.run([sys.executable, "-m", "duollm", *arguments], check=False).returncode
    if code:
        sys.exit(code)


def carry_out(run: Run, recipe: Path, seed: int, folder: Path, task_documents: int, dry: bool) -> None:
    """Make a run folder, or bring it up to date, and score it."""
    out = folder / run.name
    settings = [text for key, value in run.settings.items() for text in (f"--{key}", str(value).replace("'", ""))]
    _call([run.verb, str(recipe), "--seed", str(seed), "--out", str(out), *settings], dry)
    if not run.score:
        return
    tasks = ["--tasks", ",".join(TASKS), "--limit", str(task_documents)]
    for options, made in ([], "evaluation.json"), *([(tasks, "tasks.json")] if run.tasks else []):
        if options and not importlib.util.find_spec("lm_eval"):
            print("no tasks: lm-eval is not installed; `pip install 'duollm[eval]'`, then run this again")
        elif not _is_newer(out / FOLDER / made, out / "model" / "model.safetensors"):
            _call(["score", str(out), *run.score, *options, "--out", str(out / FOLDER)], dry)


def _is_newer(made: Path, source: Path) -> bool:
    return made.exists() and source.exists() and made.stat().st_mtime > source.stat().st_mtime


def _call(arguments: Sequence[str], dry: bool) -> None:
    print(shlex.join(["duollm", *arguments]), flush=True)
    if not dry:
        duollm(arguments)


def write_claims(runs: Sequence[Path], folder: Path, dry: bool) -> None:
    """Write the table of claims as text, JSON and CSV, figure 8, and the page of the studies side by side."""
    from duollm.report.claims import ClaimTable

    print(shlex.join(["duollm", "claims", *map(str, runs)]), flush=True)
    if not dry:
        table = ClaimTable.decide(runs)
        for form, name in ("json", "claims.json"), ("csv", "claims.csv"), ("table", "claims.txt"):
            with redirect_stdout(StringIO()) as shown:
                table.show(form)
            text = shown.getvalue()
            if form == "table":
                text += "".join(f"note: {note}\n" for note in table.notes)
            write_text(folder / name, text)
        table.write_figure(folder)
        print(text)
    studies = [str(run) for run in runs if run.name == "study" or not run.parent.name.startswith("small-")]
    if len(studies) > 1:
        _call(["report", *studies, "--out", str(folder / "comparison.html")], dry)


def main(given: Sequence[str] | None = None) -> None:
    """Run what is missing, and decide."""
    parser = argparse.ArgumentParser(
        prog="run reference", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        default=Path("runs/claims"),
        metavar="FOLDER",
        help="where all runs are (default: %(default)s)",
    )
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="seeds of the model (default: 0 1 2)")
    add("--recipe", type=Path, default=RECIPES / "reference.yaml", help="of the reference study")
    add("--small", type=Path, default=RECIPES / "quick.yaml", help="recipe of the runs that some claims need beside it")
    add(
        "--reference",
        type=Path,
        nargs="*",
        metavar="RUN",
        help="finished reference runs, in place of new ones; may be none",
    )
    add(
        "--skip-on-study",
        action="store_true",
        help="train routers that may skip on the study's model, not on one that skips",
    )
    add("--task-documents", type=int, default=150, metavar="N", help="documents of each task (default: all, 150)")
    add("--dry-run", action="store_true", help="print the commands and stop")
    options = parser.parse_args(given)
    runs: list[Path] = list(options.reference or [])
    for seed in options.seeds if options.reference is None else ():
        runs.append(options.out / f"reference-{seed}")
        _call(["study", str(options.recipe), "--seed", str(seed), "--out", str(runs[-1])], options.dry_run)
    recipe = load_recipe(options.small)
    for seed in options.seeds:
        folder = options.out / f"small-{seed}"
        for run in runs_beside(recipe, folder, folder / "study" if options.skip_on_study else None):
            carry_out(run, options.small, seed, folder, options.task_documents, options.dry_run)
            runs += [folder / run.name] if run.name != "big" else []  # which only stands behind frozen
    write_claims(runs, options.out, options.dry_run)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"run reference: error: {error}", file=sys.stderr)
        sys.exit(2)
