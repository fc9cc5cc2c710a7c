"""What `duollm trace` writes."""

import csv
import io

import numpy as np
import pytest
import torch

from duollm import cli
from duollm.measure.executor import policy_losses
from duollm.records.keys import Key
from duollm.records.tokens import read_tokens
from duollm.saved import trace as module
from duollm.saved.model import Saved
from synthetic_run import Plan, write_run
from tiny_saved import save_tiny_run

TEXT = 'An owl said "hoo, hoo",\nand\tflew.\n' * 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`model`, the texts `owls`, `text` and a run folder `run` around them."""
    folder = tmp_path_factory.mktemp("trace")
    save_tiny_run(folder)
    (folder / "text").write_text(TEXT)
    return folder


@pytest.fixture
def trace(folder, monkeypatch, capsys):
    """Run the verb; return its exit code and output."""
    monkeypatch.setattr("duollm.cli.tune_memory", lambda: True)
    monkeypatch.chdir(folder)

    def run(*arguments):
        return cli.main(["trace", *arguments]), capsys.readouterr()

    return run


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text, newline="")))


@pytest.mark.parametrize("policy", ["first:1", "all-big", "all-small"])
def test_a_text_has_a_row_per_token(trace, folder, tmp_path, policy):
    code, output = trace(
        "model", "--text", "text", "--policy", policy, "--sequence-length", "8", "--batch-size", "3",
        "--csv", str(tmp_path / "deep" / "rows.csv"),
    )  # fmt: skip
    assert code == 0
    rows = rows_of((tmp_path / "deep" / "rows.csv").read_text())
    assert tuple(rows[0]) == module.COLUMNS
    assert "".join(row["text"] for row in rows) == TEXT
    assert f"{len(rows)} tokens under {policy}" in output.out
    model = Saved.at(folder / "model").model
    window = [row for row in rows if row["window"] == "4"]
    ids = torch.tensor([[int(rows[rows.index(window[0]) - 1]["token_id"]), *(int(row["token_id"]) for row in window)]])
    assert [row["position"] for row in window] == list("1234567")
    route = {"first:1": [2, 1, 1], "all-big": [2, 2, 2], "all-small": [1, 1, 1]}[policy]
    assert {row["route"] for row in rows} == {"".join(map(str, route))}
    np.testing.assert_allclose([float(row["big_share"]) for row in rows], route.count(2) / 3, rtol=1e-5)
    for column, routes in (("nll", route), ("nll_all_small", [1, 1, 1]), ("nll_all_big", [2, 2, 2])):
        nll_BN, _ = policy_losses(model, ids.to(model.device), routes=torch.tensor(routes))
        np.testing.assert_allclose([float(row[column]) for row in window], nll_BN[0].cpu(), rtol=1e-4)


def test_without_a_text_the_test_split_is_traced_to_standard_output(trace):
    code, output = trace("run", "--documents", "3", "--windows", "2")
    assert code == 0
    rows = rows_of(output.out)
    assert {row["domain"] for row in rows} == {"owls"}
    assert len({row["document"] for row in rows}) == 3
    assert {int(row["position"]) for row in rows} == set(range(1, 16))


def test_what_the_oracle_recorded_is_read_from_the_run(trace, tmp_path):
    write_run(tmp_path, Plan(documents=4))
    (tmp_path / "config.yaml").write_text("{}\n")
    code, output = trace(str(tmp_path), "--policy", "oracle:2")
    assert code == 0
    rows = [row for row in rows_of(output.out) if row["domain"] == "prose"]
    tokens = read_tokens(tmp_path, "prose")[0]
    assert [row["text"] for row in rows] == tokens.text
    for column, key in (("nll", Key("oracle", 2, context="shared")), ("nll_all_big", Key("all-big", 6))):
        np.testing.assert_allclose([float(row[column]) for row in rows], tokens.policies[key].nll_T, rtol=1e-5)
    assert [[int(digit) for digit in row["route"]] for row in rows] == tokens.oracle(2).routes_TL.tolist()
    code, output = trace(str(tmp_path), "--policy", "oracle:9")
    assert (code, output.out) == (2, "")
    assert "policy oracle:9: not searched; there are oracle:0, " in output.err


def test_a_trace_that_fails_leaves_the_file_as_it_was(trace, tmp_path, monkeypatch):
    def broken(*arguments):
        yield from ()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_executed", broken)
    (tmp_path / "rows.csv").write_text("mine")
    code, output = trace("model", "--text", "text", "--csv", str(tmp_path / "rows.csv"))
    assert code == 2
    assert output.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]
    assert (tmp_path / "rows.csv").read_text() == "mine"


def test_progress_goes_to_standard_error(trace, monkeypatch):
    monkeypatch.setattr("duollm.terminal._SECONDS_BETWEEN_LINES", 0.0)
    code, output = trace("model", "--text", "text", "--sequence-length", "8", "--batch-size", "1")
    assert code == 0
    assert "".join(row["text"] for row in rows_of(output.out)) == TEXT
    assert "tokens/s" in output.err
    assert "trace  100%" in output.err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "the following arguments are required: RUN|MODEL"),
        (["model", "--text", "nowhere"], "nowhere: cannot be read"),
        (["model", "--text", "owls"], "owls: cannot be read: Is a directory"),
        (["model", "--text", "text", "--domains", "prose"], "--domains is about the test split"),
        (["model", "--text", "text", "--policy", "all-bog"], "did you mean 'all-big'"),
        (["model", "--text", "text", "--sequence-length", "1"], "--sequence-length: takes a whole number from 2"),
        (["model", "--text", "text", "--sequence-length", "9999"], "--sequence-length 9999: the model takes at most"),
        (["model", "--policy", "oracle:2"], "--policy oracle:2: the oracle is recorded for a run's own text"),
        (["run", "--policy", "oracle:2", "--text", "text"], "give a run, and no text"),
        (["run", "--policy", "oracle:2"], "no oracle results here; run `duollm oracle` first"),
        (["run", "--csv", "owls"], "--csv owls: a folder; give a file"),
        (["run", "--csv", "text/rows.csv"], "--csv text: "),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(trace, arguments, complaint):
    code, output = trace(*arguments)
    assert code == 2
    assert output.err.count("\n") == 1
    assert complaint in output.err
