import json

from duollm.config import Recipe
from duollm.study import run_study
from reading_pages import data_of
from tiny import SIZES
from tiny_corpus import write_corpus


def test_a_study_of_twenty_layers_searched_by_beam_reaches_its_report(tmp_path, monkeypatch):
    monkeypatch.setattr("duollm.training.loop.matmul_peak", lambda precision: 1e9)
    sizes = {key: SIZES[key] for key in ("hidden_size", "intermediate_size", "small_intermediate_size")}
    recipe = {
        "model": sizes | {"num_hidden_layers": 20},
        "data": {"domains": [str(write_corpus(tmp_path / "owls"))], "vocab_size": 280, "sequence_length": 8},
        "pretrain": {"tokens": 100, "batch_size": 4, "precision": "fp32"},
        "oracle": {"search": "beam", "documents": 2, "random_routes": 3},
        "router": {"big_layers": [10], "tokens": 100, "batch_size": 4, "precision": "fp32"},
        "ceiling": {"tokens": 32, "depths": [19], "width": 4, "precision": "fp32"},
        "report": {"bootstrap_samples": 100, "shown_documents": 1},
    }
    run_study(Recipe.model_validate(recipe), tmp_path / "run", ["duollm", "study"])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    measured = {(row["policy"], row["big_layers"]) for row in results["nll"]}
    assert {(policy, k) for policy in ("oracle", "static") for k in (0, 7, 10, 13, 20)} <= measured
    assert data_of((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))["runs"][0]["search"] == "beam"
