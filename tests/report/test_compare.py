import json
import shutil
import subprocess
import sys
from dataclasses import asdict

import pytest

from duollm.cli import main
from duollm.errors import UserError
from duollm.report.compare import print_comparison


def test_one_run_as_a_table(compared, capsys):
    assert main(["compare", str(compared[0]), "--budget", "2"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("big layers per token") == 1
    for part in (
        "2 big layers per token, pooled",
        "gains, exact",
        "oracle, committed",
        "share of big",
        "FLOPs",
        "time",
    ):
        assert part in printed


def test_several_runs_as_markdown(compared, tmp_path, capsys):
    other = shutil.copytree(compared[0], tmp_path / "other")
    print_comparison([compared[0], other], [2, 3], "prose", "markdown")
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("###")] == [
        "### 2 big layers per token, prose",
        "### 3 big layers per token, prose",
    ]
    table = [line for line in lines if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert {line.split(" | ")[0] for line in table[2:] if "gains" in line} == {"| compared", "| other"}


def test_json_is_the_rows_of_the_results(compared, capsys):
    run, _, results = compared
    print_comparison([run], [3], None, "json")
    rows = json.loads(capsys.readouterr().out)
    assert {row["big_layers"] for row in rows} == {0, 3, 6}
    first = {key: value for key, value in rows[0].items() if key != "run"}
    assert first in [asdict(row) for row in results.comparison]
    assert {row["domain"] for row in rows} == {"pooled"}


def test_runs_of_the_same_name_are_told_apart(compared, tmp_path, capsys):
    other = shutil.copytree(compared[0], tmp_path / "compared")
    print_comparison([compared[0], other], [2], None, "json")
    assert len({row["run"] for row in json.loads(capsys.readouterr().out)}) == 2


@pytest.mark.parametrize(
    ("budgets", "domain", "message"),
    [([6], None, "6 big layers were not compared; there are 1, 2, 3, 4, 5"), (None, "pros", "did you mean 'prose'")],
    ids=["budget", "domain"],
)
def test_what_was_not_compared(compared, budgets, domain, message):
    with pytest.raises(UserError, match=message):
        print_comparison([compared[0]], budgets, domain, "table")


def test_results_of_an_older_version(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(UserError, match=r"not the results of this version of duollm .* run `duollm report`"):
        print_comparison([tmp_path], None, None, "table")


def test_no_torch():
    code = "import sys, duollm.report.compare; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
