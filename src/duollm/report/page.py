"""Makes the page of a run, or of several: one file that needs no network, from page/ and what the runs measured."""

import base64
import os
import re
import webbrowser
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from duollm.analysis.analyse import analyse
from duollm.analysis.results import Results, read_results
from duollm.analysis.verdicts import Claim
from duollm.config import Recipe
from duollm.errors import UserError
from duollm.files import check_folder, write_text
from duollm.recipe_files import recipe_of
from duollm.records.tokens import read_tokens
from duollm.report.claims import claims_together
from duollm.report.compare import unique_name
from duollm.report.figures import draw_figures
from duollm.report.payload import compressed, page_data, rounded
from duollm.terminal import say, working

MODULES = (
    *("dom", "align", "decode", "state", "colour", "names", "chart", "scatter", "table", "frontier", "story"),
    *("quantities", "text", "inspector", "explorer", "layers", "classes", "results", "runs", "main"),
)
"""The modules in page/, each after those that it imports."""
_IMPORT = re.compile(r"^import [^;]*;\n", re.MULTILINE)
_EXPORT = re.compile(r"^export (?=const|let|function|async|class)", re.MULTILINE)


def write_report(run: Path, shown_documents: int = 1000, missing: Sequence[str] = (), figures: bool = True) -> Path:
    """Write the report.html of an analysed run, and its figures; return the page's path.

    Args:
        run: a run folder that holds results.json.
        shown_documents: number of documents per domain, at most, whose text the page shows.
        missing: stages of the study that have not run yet; the page names them.
        figures: whether to draw the figures for papers, which takes most of the time. The page's charts do without.

    Raises:
        UserError: the run was not analysed, or a file is missing or not of this run.
    """
    results = read_results(run)
    domains = [read_tokens(run, domain)[0] for domain in results.domains]
    if figures:
        draw_figures(run, results, domains)
    write_text(run / "report.html", assemble([page_data(run, results, domains, shown_documents, missing)]))
    return run / "report.html"


def assemble(
    runs: Sequence[Mapping[str, Any]],
    settings: Sequence[tuple[str, Sequence[str]]] = (),
    together: Mapping[str, Sequence[Claim]] | None = None,
) -> str:
    """Put style, modules and data into the page.

    Args:
        runs: the data of each run, see `page_data`.
        settings: the settings in which several runs differ, each with its value in every run.
        together: the claims as several runs decide them together, by domain; see `claims_together`.

    The modules become one script, since a page opened from a file cannot import. Their top-level names must differ.
    """
    folder = files("duollm.report") / "page"
    script = "\n".join((folder / f"{name}.js").read_text(encoding="utf-8") for name in MODULES)
    claims = {domain: rounded([asdict(claim) for claim in found]) for domain, found in (together or {}).items()}
    data = compressed({"runs": runs, "settings": settings, "together": claims})
    parts = {
        "style": (folder / "page.css").read_text(encoding="utf-8"),
        "data": base64.b64encode(data).decode(),
        "script": _EXPORT.sub("", _IMPORT.sub("", script)),
    }
    page = (folder / "page.html").read_text(encoding="utf-8")
    return re.sub(r"<!-- (style|data|script) -->", lambda slot: parts[slot[1]], page)


_FACTS = ("version", "commit")
"""What of a run's provenance is compared."""
_MEASURED = ("oracle", "ceiling", "evaluate")


def make_page(runs: Sequence[Path], out: Path | None, anew: bool) -> Path:
    """Make the page of a run in its folder, or that of several runs at `out`; return its path.

    Args:
        out: default: comparison.html.
        anew: also if nothing was measured since the page of the run was made.

    Raises:
        UserError: as `rewrite_report`, or the page cannot be written.
    """
    if len(runs) == 1:
        if out:
            raise UserError("out is for several runs; the page of one run is report.html in its folder")
        recipe_of(runs[0])  # a folder of no run is refused before its page is looked for
        return rewrite_report(runs[0]) if anew or not is_current(runs[0]) else runs[0] / "report.html"
    page = out or Path("comparison.html")
    if page.is_dir():
        raise UserError(f"out {page}: a folder; give a file, such as {page / 'comparison.html'}")
    check_folder("out", page.parent)
    compare_reports(runs, page)
    return page


def open_page(page: Path) -> None:
    """Open a page in the browser of this machine, or say that there is none."""
    if not webbrowser.open(page.resolve().as_uri()):
        print("no browser was found on this machine; open that file in one elsewhere")


def rewrite_report(run: Path) -> Path:
    """Analyse what a run has measured so far, and write its results.json, figures and report.html.

    Returns:
        The path of the page.

    Raises:
        UserError: no run folder, or one whose oracle has not been searched.
    """
    recipe = recipe_of(run)
    with working("report"):
        say("bootstraps the intervals")
        analyse(run, recipe.report.bootstrap_samples, recipe.seed)
        say("draws the figures")
        return write_report(run, recipe.report.shown_documents, missing_stages(run, recipe))


def compare_reports(runs: Sequence[Path], out: Path) -> None:
    """Write one page for several runs: frontiers overlaid, verdicts side by side, settings, and the text they share.

    Raises:
        UserError: as `rewrite_report`; or a run is given twice.
    """
    recipes, data = [recipe_of(run) for run in runs], []
    if len({run.resolve() for run in runs}) < len(runs):
        raise UserError("a run is given twice; leave one of them out")
    for run, recipe in zip(runs, recipes, strict=True):
        results, missing = _current_results(run), missing_stages(run, recipe)
        domains = [read_tokens(run, domain)[0] for domain in results.domains]
        one = page_data(run, results, domains, recipe.report.shown_documents, missing, len(runs))
        folder = quote(Path(os.path.relpath(run / "figures", out.parent)).as_posix())
        data.append(one | {"name": unique_name(run, runs), "folder": folder})
    settings = differences([_settings(*pair) for pair in zip(recipes, data, strict=True)])
    write_text(out, assemble(data, settings, claims_together(runs)))


def _current_results(run: Path) -> Results:
    if is_current(run):
        with suppress(UserError):  # of another version of duollm
            return read_results(run)
    rewrite_report(run)
    return read_results(run)


def differences(settings: Sequence[Mapping[str, str]]) -> list[tuple[str, list[str]]]:
    """Return the keys whose values differ, each with the values of all runs."""
    keys = dict.fromkeys(key for one in settings for key in one)
    rows = [(key, [one.get(key, "") for one in settings]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _settings(recipe: Recipe, data: Mapping[str, Any]) -> dict[str, str]:
    provenance = data["results"]["provenance"]
    flat = {name: str(provenance[name]) for name in _FACTS if name in provenance}
    for name, value in recipe.model_dump(exclude={"name"}).items():
        inner = value.items() if isinstance(value, dict) else [("", value)]
        flat |= {f"{name}.{key}".rstrip("."): str(one) for key, one in inner}
    return flat


def missing_stages(run: Path, recipe: Recipe) -> list[str]:
    """Return the stages after the oracle that a run has not finished."""
    stages = [*(["ceiling"] if recipe.ceiling.enabled else []), "evaluate"]
    return [name for name in stages if not (run / "stages" / f"{name}.json").is_file()]


def is_current(run: Path) -> bool:
    """Whether the page exists and is newer than all that was measured."""
    page, measured = run / "report.html", [path for name in _MEASURED for path in (run / name).rglob("*.*")]
    return page.is_file() and all(path.stat().st_mtime_ns <= page.stat().st_mtime_ns for path in measured)
