"""Whole studies of a route space in which layers vary in groups."""

import json

import numpy as np
import pandas as pd
import pytest

from duollm.config import Recipe
from duollm.routes.space import RouteSpace
from duollm.study import run_study
from tiny_corpus import write_corpus

pytestmark = pytest.mark.usefixtures("quick_machine")


@pytest.mark.parametrize(
    ("scope", "branches", "space", "budgets"),
    [
        ("layer", ["skip", "big"], {"groups": 2, "fixed": {"big": [0]}}, [1, 3, 5]),
        ("ffn", ["small", "big"], {"groups": [[0, 3], [1, 2], [4]]}, [0, 1, 2, 3, 4, 5]),
    ],
    ids=["skip-layer", "small"],
)
def test_a_study_over_groups_ends_in_a_report(tmp_path, scope, branches, space, budgets):
    sizes = {"hidden_size": 16, "num_hidden_layers": 5, "intermediate_size": 24, "small_intermediate_size": 6}
    shares = (0.2, 0.4, 0.4)
    recipe = {
        "model": sizes | {"skip_scope": scope},
        "data": {"domains": [str(write_corpus(tmp_path / "owls", documents=30))], "vocab_size": 300},
        "pretrain": {"tokens": 2000, "batch_size": 8, "precision": "fp32", "branch_shares": shares},
        "oracle": {"documents": 6, "random_routes": 3, "branches": branches, "contexts": ["shared", "committed"]},
        "router": {"kinds": ["sequential", "distilled"], "big_layers": [3], "tokens": 500, "batch_size": 8},
        "ceiling": {"tokens": 500, "width": 4, "precision": "fp32"},
        "evaluate": {"documents": 6, "windows_per_document": 1},
        "report": {"bootstrap_samples": 100, "shown_documents": 1},
    }
    recipe["oracle"] |= space
    recipe["data"] |= {"sequence_length": 16, "test_share": 0.3}
    recipe["router"] |= {"branches": branches, "precision": "fp32", "label_tokens": 32}
    run_study(Recipe.model_validate(recipe), tmp_path / "run", ["duollm", "study"])
    assert (tmp_path / "run" / "report.html").stat().st_size > 100_000
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    rows = {(row["policy"], row["kind"], row["big_layers"]): row for row in results["comparison"]}
    for router in ("sequential", "distilled"):
        assert rows[f"{router}_k3", router, 3]["gain_at_spent"]
    assert {row["big_layers"] for row in results["nll"] if row["policy"] == "oracle"} == set(budgets)
    assert {row["big_layers"] for row in results["selection_noise"]} == set(budgets[1:-1])
    facts = json.loads((tmp_path / "run" / "oracle" / "manifest.json").read_text())
    searched = RouteSpace.from_facts(facts)
    assert {row["big_layers"] for row in results["difficulty_by_class"]} == {searched.focus_budgets[0]}
    table = pd.read_parquet(tmp_path / "run" / "oracle" / "owls.parquet")
    assert (searched.count_big(table["route_shared_k3"].to_numpy()) == 3).all()
    np.testing.assert_allclose(table["executed_committed_k3"], table["nll_committed_k3"], atol=1e-4)
