"""What `duollm score` takes and leaves behind."""

import errno
import json
import re
import shutil

import pyarrow.parquet as pq
import pytest

from duollm import cli
from duollm.routers.registry import make_router, save_router
from duollm.routes.space import RouteSpace
from tiny import tiny_config
from tiny_saved import save_tiny_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`model`, the texts `owls`, and a run folder `run` around them."""
    folder = tmp_path_factory.mktemp("score")
    save_tiny_run(folder)
    return folder


@pytest.fixture
def score(folder, monkeypatch, capsys):
    """Run the verb with short options; return its exit code and output."""
    monkeypatch.setattr("duollm.cli.tune_memory", lambda: True)
    monkeypatch.chdir(folder)

    def run(*arguments):
        code = cli.main(["score", *arguments])
        return code, capsys.readouterr()

    return run


SMALL = ("--documents", "3", "--windows", "2", "--batch-size", "4")


def test_a_sweep_of_a_model_writes_its_table_and_every_token(score, folder, tmp_path):
    code, output = score(
        "model", "--domains", "owls", "--sequence-length", "16", *SMALL,
        "--sweep", "first", "--shares", "0,0.34,1", "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert code == 0
    assert "first:1" in output.out
    results = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    rows = {row["policy"]: row for row in results["rows"]}
    assert list(rows) == ["first:0", "first:1", "first:3"]
    assert [row["big_share"] for row in rows.values()] == pytest.approx([0, 1 / 3, 1])
    assert rows["first:3"]["over_all_big"] == 0
    assert rows["first:0"]["relative_flops"] < rows["first:1"]["relative_flops"] < 1
    assert all(row["low"] <= row["nll"] <= row["high"] and row["documents"] == 3 for row in rows.values())
    tokens = pq.read_table(tmp_path / "out" / "owls.parquet").to_pandas()
    assert tokens.groupby("policy")["nll"].mean().to_dict() == pytest.approx(
        {policy: row["nll"] for policy, row in rows.items()}, rel=1e-5
    )
    assert set(tokens.loc[tokens["policy"] == "first:1", "route"]) == {"211"}


def test_a_run_brings_its_own_text_seed_and_length(score, tmp_path):
    code, _ = score("run", *SMALL, "--out", str(tmp_path / "run"))
    assert code == 0
    results = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert (results["sequence_length"], results["provenance"]["seed"]) == (16, 5)
    assert [row["policy"] for row in results["rows"]] == ["all-big"]


def test_a_run_brings_its_routers(score, folder, tmp_path):
    router = make_router("linear", tiny_config(vocab_size=300), ["small", "big"])
    facts = {"kind": "linear", "branches": ["small", "big"], "big_layers": 0}
    save_router(router, folder / "run" / "routers" / "linear_k0", facts)
    policies = ("--policy", "linear_k0", "--policy", "all-small")
    assert score("run", *SMALL, *policies, "--out", str(tmp_path / "run"))[0] == 0
    routed, small = json.loads((tmp_path / "run" / "evaluation.json").read_text())["rows"]
    assert (routed["policy"], routed["nll"]) == ("linear_k0", pytest.approx(small["nll"]))
    assert routed["relative_flops"] > small["relative_flops"], "what the router computes counts"


def test_a_bad_policy_stops_before_any_is_run(score, monkeypatch):
    monkeypatch.setattr("duollm.saved.text.score", lambda *_: pytest.fail("something was run"))
    code, output = score("run", *SMALL, "--policy", "all-big", "--policy", "first:4")
    assert code == 2
    assert "0 .. 3" in output.err


def test_text_tokenized_for_the_occasion_is_that_of_the_run(score, folder, tmp_path):
    """The same split and windows, whether read from the run's data or made anew from the same text."""
    for name, domains in (("own", []), ("anew", ["--domains", str(folder / "owls")])):
        assert score("run", *domains, *SMALL, "--out", str(tmp_path / name))[0] == 0
    own, anew = (pq.read_table(tmp_path / name / "owls.parquet").to_pandas() for name in ("own", "anew"))
    assert own.drop(columns="nll").equals(anew.drop(columns="nll"))
    assert own["nll"].to_numpy() == pytest.approx(anew["nll"].to_numpy(), abs=1e-5)
    assert own["route"].str.len().eq(RouteSpace(3).num_layers).all()


def test_tasks_write_samples_with_routes(score, tmp_path):
    pytest.importorskip("lm_eval", reason="needs the extra `eval`")
    pytest.importorskip("accelerate", reason="needs the extra `eval`")
    code, output = score(
        "model", "--tasks", "duollm_prose_continuation", "--limit", "2",
        "--policy", "all-big", "--policy", "routes:211", "--batch-size", "auto", "--out", str(tmp_path),
    )  # fmt: skip
    assert code == 0
    assert "acc_norm" in output.out
    assert "note: batch size auto: 8 rows" in output.err
    written = json.loads((tmp_path / "tasks.json").read_text())
    rows = written["rows"]
    assert [note[:15] for note in written["notes"]] == ["batch size auto"]
    assert [(row["policy"], row["metric"], row["samples"]) for row in rows] == [
        (policy, metric, 2) for policy in ("all-big", "routes:211") for metric in ("acc", "acc_norm")
    ]
    assert [row["big_share"] for row in rows] == pytest.approx([1, 1, 1 / 3, 1 / 3])
    lines = (tmp_path / "samples_duollm_prose_continuation.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert [sample["policy"] for sample in samples] == ["all-big"] * 2 + ["routes:211"] * 2
    assert set(samples[2]["routes"][0]) == {"211"}


@pytest.mark.parametrize("out", ["taken", "taken/x", "x" * 300])
def test_a_place_where_nothing_can_be_written_is_noticed_before_the_work(score, folder, monkeypatch, out):
    monkeypatch.setattr("duollm.saved.text.score", lambda *_: pytest.fail("something was run"))
    (folder / "taken").write_text("mine")
    code, output = score("run", *SMALL, "--out", out)
    assert code == 2
    assert output.err.startswith("duollm: error: --out ")
    assert output.err.count("\n") == 1
    assert (folder / "taken").read_text() == "mine"


def test_files_are_written_before_anything_is_printed(score, monkeypatch, tmp_path):
    def print_table(title, rows):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("duollm.saved.text.print_table", print_table)
    code, output = score("run", *SMALL, "--out", str(tmp_path / "out"))
    assert code == 2
    assert "No space left on device" in output.err
    assert (tmp_path / "out" / "evaluation.json").is_file()


def test_square_brackets_in_the_name_of_a_folder_are_data(score, folder, tmp_path):
    (tmp_path / "[").mkdir()
    (tmp_path / "[" / "b]").symlink_to(folder / "run")
    code, output = score(str(tmp_path / "[" / "b]"), *SMALL)
    assert code == 0
    assert "[/b]: windows of 16 tokens" in output.out


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("manifest.json", b"{"),
        ("manifest.json", b"{}"),
        ("test.npy", b""),
        ("test.npy", b"version https://git-lfs.github.com/spec/v1\n"),
        ("documents.parquet", b""),
        ("../config.yaml", b"seed: ["),
        ("../config.yaml", b"seed: 1\nseed: 2\n"),
        ("../config.yaml", b"\xff"),
    ],
)
def test_damage_in_a_run_is_a_line_with_the_way_out(score, folder, tmp_path, name, content):
    shutil.copytree(folder / "run", tmp_path / "run")
    (tmp_path / "run" / "data" / name).write_bytes(content)
    code, output = score(str(tmp_path / "run"), *SMALL)
    assert code == 2
    assert output.err.count("\n") == 1
    assert re.search(
        r"damaged .* makes it anew|config.yaml: .*; mend that recipe, or give the folder of the model itself",
        output.err,
    )


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "the following arguments are required: MODEL"),
        (["model", "recipes/quick.yaml"], "takes no further argument"),
        (["model", "--dry-run"], "unknown option --dry-run"),
        (["model", "--limit", "3"], "--limit needs --tasks"),
        (["model", "--tasks", "x", "--domains", "prose"], "--domains is about losses"),
        (["model", "--policy", "all-big", "--sweep", "first"], "--sweep: not allowed with argument --policy"),
        (["model", "--shares", "0,1"], "--shares needs --sweep"),
        (["model", "--sweep", "first", "--shares", "0;1"], "--shares: takes a number from 0 to 1, got '0;1'"),
        (["model", "--sweep", "frist"], "did you mean 'first'"),
        (["model", "--documents", "0"], "--documents: takes a whole number from 1 to 1,000,000,000, got '0'"),
        (["model", "--batch-size", "many"], "--batch-size: takes a whole number from 1 to 1,000,000,000, got 'many'"),
        (["model", "--batch-size", "auto"], "--batch-size auto goes with --tasks"),
        (["model", "--sequence-length", "1"], "--sequence-length: takes a whole number from 2"),
        (["model", "--batch-size", "99999999999999999999"], "--batch-size: takes a whole number from 1 to"),
        (["model", "--domains", "owls,"], "--domains: 'owls,' holds an empty value"),
        (["model", "--tasks", ""], "--tasks: '' holds an empty value"),
        (["model", "--out", ""], "--out: an empty value was given"),
        ([""], "MODEL: an empty value was given"),
        (["model", "--domains", "x" * 300], "File name too long"),
        (["owls"], "neither a saved duo"),
        (["nowhere"], "neither a saved duo"),
        (["model", "--domains", "owls", "--policy", "all-bog"], "did you mean 'all-big'"),
        (["model", "--domains", "crows"], "unknown domain 'crows'"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(score, arguments, complaint):
    code, output = score(*arguments)
    assert code == 2
    assert output.err.count("\n") == 1
    assert complaint in output.err
