"""What `duollm report` makes of a run folder."""

import os
import shutil
import subprocess
import sys

import pytest

from duollm import cli
from duollm.config import Recipe, ReportConfig
from duollm.recipe_files import to_yaml
from duollm.report.page import differences, rewrite_report
from reading_pages import data_of
from synthetic_run import Plan, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = tmp_path_factory.mktemp("rewrite") / "run"
    write_run(run, Plan(documents=4))
    (run / "config.yaml").write_text(to_yaml(Recipe(report=ReportConfig(bootstrap_samples=100))))
    (run / "stages").mkdir()
    (run / "stages" / "evaluate.json").write_text("{}")
    rewrite_report(run)
    return run


@pytest.fixture
def opened(monkeypatch):
    """Stand in for the browser: what it was asked to open."""
    asked = []
    monkeypatch.setattr("webbrowser.open", lambda address: asked.append(address) or True)
    return asked


def test_the_page_is_made_without_torch(run):
    (run / "report.html").unlink(missing_ok=True)
    code = "import sys\nfrom duollm.cli import main\ncode = main(sys.argv[1:])\nprint(code, *sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code, "report", run], capture_output=True, text=True, check=True)
    last = shown.stdout.splitlines()[-1].split()
    assert last[0] == "0"
    assert not {"torch", "transformers"} & set(last)
    page = (run / "report.html").read_text()
    [data] = data_of(page)["runs"]
    assert data["missing"] == ["ceiling"]
    assert data["results"]["bootstrap"]["samples"] == 100


def test_a_page_that_is_current_is_opened_as_it_is(run, opened, capsys):
    rewrite_report(run)
    (run / "report.html").write_text("mine")
    assert cli.main(["report", str(run), "--open"]) == 0
    assert (run / "report.html").read_text() == "mine"
    assert opened == [(run / "report.html").resolve().as_uri()]
    assert capsys.readouterr().out.splitlines()[-1] == str(run / "report.html")


def test_an_old_page_is_made_anew_before_it_is_opened(run, opened):
    (run / "report.html").write_text("old")
    later = (run / "report.html").stat().st_mtime + 1
    os.utime(next((run / "evaluate").rglob("*.parquet")), (later, later))
    assert cli.main(["report", str(run), "--open"]) == 0
    assert "<html" in (run / "report.html").read_text()
    assert len(opened) == 1


def test_without_a_browser_a_line_says_so(run, monkeypatch, capsys):
    monkeypatch.setattr("webbrowser.open", lambda address: False)
    assert cli.main(["report", str(run), "--open"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "no browser was found on this machine; open that file in one elsewhere"
    )


def test_several_runs_make_one_page(run, tmp_path, monkeypatch, capsys):
    shutil.copytree(run, tmp_path / "a b" / "run")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", str(run), "a b/run", "--out", "pages/both.html"]) == 0
    data = data_of((tmp_path / "pages" / "both.html").read_text())
    assert [one["name"] for one in data["runs"]] == [str(run), "a b/run"]
    assert data["runs"][1]["folder"] == "../a%20b/run/figures"
    assert data["settings"] == []
    for arguments, complaint in (
        ([str(run), str(run)], "a run is given twice"),
        ([str(run), "pages"], "pages: no run folder"),
        ([str(run), "a b/run", "--out", "pages"], "--out pages: a folder"),
        ([str(run), "--out", "x.html"], "--out is for several runs"),
    ):
        assert cli.main(["report", *arguments]) == 2
        assert complaint in capsys.readouterr().err


def test_differences_name_what_only_one_run_has():
    rows = differences([{"seed": "1", "a": "x", "only": "y"}, {"seed": "2", "a": "x"}])
    assert rows == [("seed", ["1", "2"]), ("only", ["y", ""])]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "no run folder (no config.yaml); make one with `duollm study`"),
        ("{}", "no oracle results here; run `duollm oracle` first"),
        ("seed: [", "config.yaml: "),
    ],
)
def test_a_folder_without_results_is_one_line(tmp_path, capsys, content, complaint):
    if content is not None:
        (tmp_path / "config.yaml").write_text(content)
    for options in ([], ["--open"]):
        assert cli.main(["report", str(tmp_path), *options]) == 2
        shown = capsys.readouterr().err
        assert shown.count("\n") == 1
        assert complaint in shown
