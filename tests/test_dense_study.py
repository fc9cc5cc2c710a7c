"""A whole study that starts from a dense checkpoint."""

import json
from pathlib import Path

import pytest
import torch

from duollm.checks import given_config
from duollm.config import Recipe
from duollm.convert.saving import load_model
from duollm.errors import UserError
from duollm.plan import plan
from duollm.recipe_files import load_recipe
from duollm.stages import _fingerprints
from duollm.study import Study, run_study
from tiny_corpus import write_corpus
from tiny_dense import write_dense
from tiny_training import ALONE


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    return write_dense(folder / "llama", write_corpus(folder / "owls", documents=30))


@pytest.fixture
def study(dense, tmp_path, monkeypatch, capsys):
    """Run the recipe with changes; return the stages that were not skipped."""
    monkeypatch.setattr("duollm.training.loop.matmul_peak", lambda precision: 1e9)
    monkeypatch.setattr("duollm.convert.small_ffn.faster_precision", lambda: "fp32")

    def run(until="report", run_folder=tmp_path / "run", **changes):
        values = {
            "name": "dense",
            "model": {"dense": str(dense), "small_intermediate_size": 4},
            "convert": {"sample_tokens": 320, "steps": 5},
            "data": {"domains": [str(dense.parent / "owls")], "sequence_length": 16, "test_share": 0.3},
            "pretrain": {"tokens": 500, "batch_size": 8, "precision": "fp32", "freeze": "big"},
            "oracle": {"documents": 6, "random_routes": 3, "search": "beam", "contexts": ["reference"]},
            "router": {"kinds": ["linear"], "big_layers": [1, 2], "tokens": 300, "batch_size": 8, "precision": "fp32"},
            "ceiling": {"enabled": False},
            "report": {"bootstrap_samples": 100, "shown_documents": 1},
        }
        values |= {key: values[key] | change for key, change in changes.items()}
        capsys.readouterr()
        run_study(Recipe.model_validate(values), run_folder, ["duollm", "study"], until)
        return [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if ": done in" in line]

    return run


def test_it_runs_to_its_report_and_is_skipped_when_unchanged(study, dense, tmp_path):
    assert study()[:4] == ["data", "convert", "pretrain", "oracle"]
    assert (tmp_path / "run" / "report.html").exists()
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {"all-small", "all-big", "oracle"} <= {row["policy"] for row in results["nll"]}
    assert (tmp_path / "run" / "data" / "tokenizer" / "tokenizer.json").read_text() == (
        dense / "tokenizer.json"
    ).read_text()
    converted, trained = (load_model(tmp_path / "run" / name).state_dict() for name in ("converted", "model"))
    changed = {name for name, value in trained.items() if not torch.equal(value, converted[name])}
    assert changed == {name for name in converted if ".mlp.small." in name}
    assert study() == []


@pytest.mark.parametrize(
    ("changes", "redone"),
    [
        ({"pretrain": {"learning_rate": 0.01}}, ["pretrain"]),
        ({"convert": {"small_init": "slice"}}, ["convert", "pretrain"]),
        ({"model": {"small_intermediate_size": 5}}, ["convert", "pretrain"]),
        ({"pretrain": {"tokens": 0}}, ["pretrain"]),
    ],
    ids=["learning-rate", "small-init", "width", "no-training"],
)
def test_a_changed_setting_redoes_what_it_touches(study, changes, redone):
    study("pretrain")
    assert study("pretrain", **changes) == redone


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"router": {"big_layers": [4]}}, r"router\.big_layers holds 4; .*llama has 3 layers"),
        ({"oracle": {"big_layers": [4]}}, r"oracle\.big_layers or more_budgets: a budget of 4"),
        ({"data": {"sequence_length": 65}}, r"sequence_length \(65\) must not exceed the 64 positions"),
        ({"model": {"dense": "."}}, r"model\.dense: \. is no folder with a config\.json"),
    ],
    ids=["router-budget", "oracle-budget", "positions", "no-checkpoint"],
)
def test_what_does_not_fit_the_checkpoint_is_refused_before_the_small_ffns_are_made(
    study, tmp_path, monkeypatch, changes, complaint
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=complaint):
        study("pretrain", **changes)
    assert not (tmp_path / "run" / "converted").exists()


def test_a_checkpoint_that_names_no_family_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"hidden_size": 4}')
    with pytest.raises(UserError, match=r"model\.dense: .* model type None is not supported"):
        given_config(Recipe.model_validate({"model": {"dense": str(tmp_path)}}))


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ({"model.path": "a", "model.dense": "b"}, r"model\.path .* and model\.dense .*; give one"),
        ({"pretrain.freeze": "big"}, r"pretrain\.freeze needs model\.dense"),
        ({"pretrain.tokens": "0"}, r"pretrain\.tokens 0 needs model\.dense"),
    ],
    ids=["path-and-dense", "freeze-from-scratch", "untrained"],
)
def test_contradictions_in_a_recipe_are_refused(overrides, complaint):
    with pytest.raises(UserError, match=complaint):
        load_recipe(None, overrides)


def test_a_plan_reads_the_checkpoints_sizes(dense):
    fits = {"data.sequence_length": "16", "router.big_layers": "[1]"}
    recipe = load_recipe(None, fits | {"model.dense": str(dense), "model.small_intermediate_size": "4"})
    parts = {row.label: row.value for row in plan(recipe) if row.table == "parameters"}
    assert (parts["embedding"], parts["big"], parts["small"]) == (300 * 16, 3 * 3 * 16 * 24, 3 * 3 * 16 * 4)


def test_recipes_without_a_checkpoint_keep_their_fingerprints(monkeypatch):
    """A change of these repeats the training of every run folder there is."""
    monkeypatch.setattr("duollm.study.source_fingerprint", lambda config, seed: "the same text")
    made = _fingerprints(Study(Recipe(), Path("run"), ALONE).stages())
    assert (made["data"], made["pretrain"]) == ("187001d1999515a8", "b64857a9e84c3b12")
