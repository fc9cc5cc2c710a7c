"""Writes report.html: one file that needs no network, assembled from the files in page/ and the data of a run."""

import base64
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from duollm.analysis.results import read_results
from duollm.files import write_text
from duollm.records.tokens import read_tokens
from duollm.report.figures import draw_figures
from duollm.report.payload import compressed, page_data

MODULES = (
    *("dom", "align", "decode", "state", "colour", "names", "chart", "scatter", "table", "frontier", "story"),
    *("quantities", "text", "inspector", "explorer", "layers", "results", "runs", "main"),
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


def assemble(runs: Sequence[Mapping[str, Any]], settings: Sequence[tuple[str, Sequence[str]]] = ()) -> str:
    """Put style, modules and data into the page.

    Args:
        runs: the data of each run, see `page_data`.
        settings: the settings in which several runs differ, each with its value in every run.

    The modules become one script, since a page opened from a file cannot import. Their top-level names must differ.
    """
    folder = files("duollm.report") / "page"
    script = "\n".join((folder / f"{name}.js").read_text(encoding="utf-8") for name in MODULES)
    data = compressed({"runs": runs, "settings": settings})
    parts = {
        "style": (folder / "page.css").read_text(encoding="utf-8"),
        "data": base64.b64encode(data).decode(),
        "script": _EXPORT.sub("", _IMPORT.sub("", script)),
    }
    page = (folder / "page.html").read_text(encoding="utf-8")
    return re.sub(r"<!-- (style|data|script) -->", lambda slot: parts[slot[1]], page)
