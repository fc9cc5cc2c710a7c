"""`duollm report`: makes a run's page anew from the files in its folder, without a model."""

from pathlib import Path

from duollm.analysis.analyse import analyse
from duollm.config import Recipe, load_recipe
from duollm.errors import UserError
from duollm.progress import say, working
from duollm.report.page import write_report

_MEASURED = ("oracle", "ceiling", "evaluate")


def rewrite_report(run: Path) -> Path:
    """Analyse what a run has measured so far, and write its results.json, figures and report.html.

    Returns:
        The path of the page.

    Raises:
        UserError: no run folder, or one whose oracle has not been searched.
    """
    recipe = recipe_of(run)
    stages = [*(["ceiling"] if recipe.ceiling.enabled else []), "evaluate"]
    missing = [name for name in stages if not (run / "stages" / f"{name}.json").is_file()]
    with working("report"):
        say("bootstraps the intervals")
        analyse(run, recipe.report.bootstrap_samples, recipe.seed)
        say("draws the figures")
        return write_report(run, recipe.report.shown_documents, missing)


def recipe_of(run: Path) -> Recipe:
    """Read the recipe of a run.

    Raises:
        UserError: the folder is none of a run.
    """
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run}: no run folder (no config.yaml); make one with `duollm study`")
    return load_recipe(run / "config.yaml")


def is_current(run: Path) -> bool:
    """Whether the page exists and is newer than all that was measured."""
    page, measured = run / "report.html", [path for name in _MEASURED for path in (run / name).rglob("*.*")]
    return page.is_file() and all(path.stat().st_mtime_ns <= page.stat().st_mtime_ns for path in measured)
