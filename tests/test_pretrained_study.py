"""recipes/pretrained.yaml on random checkpoints of every family: the whole study without training."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dense import FAMILIES, dense_model
from duollm.checks import completed
from duollm.data.tokenizer import train_tokenizer
from duollm.errors import UserError
from duollm.plan import plan
from duollm.recipe_files import load_recipe
from duollm.routers.static import static_priors
from duollm.routes.space import RouteSpace
from duollm.study import Study, run_study
from duollm.training.world import join_world
from reading_pages import data_of
from tiny_corpus import write_corpus

RECIPE = Path(__file__).parents[1] / "recipes" / "pretrained.yaml"

pytestmark = pytest.mark.usefixtures("quick_machine")


@pytest.fixture(scope="module")
def owls(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("texts") / "owls", documents=30)


@pytest.fixture
def study(tmp_path, owls):
    """Make a random checkpoint and run the shipped recipe on it, with little text."""

    def run(family, until="report", **changes):
        sizes = FAMILIES[family].to_diff_dict() | {"vocab_size": 300, "num_hidden_layers": 6}
        sizes.pop("layer_types", None)
        dense = tmp_path / "dense"
        dense_model(type(FAMILIES[family])(**sizes)).save_pretrained(dense)
        train_tokenizer([path.read_text() for path in sorted(owls.iterdir())], 300).save_pretrained(dense)
        small = {
            "model.dense": str(dense),
            "data.domains": f"[{owls}]",
            "data.sequence_length": "16",
            "data.test_share": "0.3",
            "oracle.groups": "3",
            "router.every_budget_tokens": "300",
            "router.precision": "fp32",
            "ceiling.tokens": "300",
            "ceiling.precision": "fp32",
            "report.bootstrap_samples": "100",
            "report.shown_documents": "1",
        }
        recipe = load_recipe(RECIPE, small | {key.replace("__", "."): value for key, value in changes.items()})
        run_study(recipe, tmp_path / "run", ["duollm", "study"], until)
        return tmp_path / "run"

    return run


@pytest.mark.parametrize(
    ("family", "scope"), [*zip(FAMILIES, ("layer", "ffn", "layer", "ffn", "ffn"), strict=True)], ids=list(FAMILIES)
)
def test_a_checkpoint_is_studied_without_training(study, family, scope):
    whole = family == "llama"
    run = study(family, "report" if whole else "evaluate", model__skip_scope=scope)
    space = RouteSpace.from_facts(json.loads((run / "oracle" / "manifest.json").read_text()))
    assert space == RouteSpace(6, (0, 2), 3)
    table = pd.read_parquet(run / "oracle" / "owls.parquet")
    np.testing.assert_allclose(table["nll_shared_k6"], table["nll_big"], atol=1e-4)
    np.testing.assert_allclose(table["nll_shared_k0"], table["nll_small"], atol=1e-4)  # all skipped
    assert {"resampled_nll_shared_k2", "nll_random100_k4", "nll_static_k2", "executed_shared_k4"} <= set(table)
    assert {path.name for path in (run / "evaluate").iterdir() if path.is_dir()} == {
        f"sequential_k{k}{way}" for k in (2, 4) for way in ("", "_exact")
    }
    if whole:
        results = json.loads((run / "results.json").read_text())
        for rows in ("selection_noise", "ceiling", "decomposition", "comparison"):
            assert {2, 4} <= {row["big_layers"] for row in results[rows]}, rows
        [data] = data_of((run / "report.html").read_text())["runs"]
        assert (data["cheapest"], len(data["groups"])) == ("all skipped", 3)


def test_the_ceiling_is_measured_anew_if_static_is_chosen_in_another_precision(tmp_path):
    settings = []
    for precision in ("fp32", "bf16"):
        recipe = load_recipe(
            RECIPE, {"router.precision": precision, "router.big_layers": "[15]", "router.shares": "null"}
        )
        study = Study(recipe, tmp_path, join_world())
        [ceiling] = [stage for stage in study.stages() if stage.name == "ceiling"]
        settings.append(ceiling.settings)
    assert settings[0] != settings[1]


def test_budgets_in_layers_are_not_dropped_for_shares():
    with pytest.raises(UserError, match=r"^router\.big_layers: .* set router\.shares to null$"):
        load_recipe(RECIPE, {"router.big_layers": "[15]"})


def test_budgets_given_as_shares_are_the_nearest_that_groups_allow():
    recipe = load_recipe(RECIPE, {"router.shares": "[0.01, 0.45, 0.5, 0.95]"})
    assert completed(recipe, recipe.model).router.big_layers == [3, 12, 15, 27]


def test_twelve_groups_at_most_are_made_by_depth():
    for layers, groups in ((30, 10), (24, 12), (32, 8), (26, 12), (12, None)):
        sizes = {"model.num_hidden_layers": str(layers), "model.dense": "owner/name", "oracle.groups": "auto"}
        rows = {row.label: row.value for row in plan(load_recipe(RECIPE, sizes)) if row.table.startswith("oracle")}
        assert rows["routes"] == 2 ** (groups or layers)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"oracle__groups": "[[0, 1], [2]]"}, r"^oracle\.groups or fixed: layer 3 is in no group and not fixed"),
        ({"oracle__groups": "[[0, 1, 2, 3], [3, 4, 5]]"}, r"^oracle\.groups or fixed: layer 3 is named more than once"),
        ({"oracle__memory_gib": "1e6"}, r"^oracle\.memory_gib: the search would take 1e\+06 GiB"),
        ({"router__shares": "null", "router__big_layers": "[3]"}, r"^router\.big_layers holds 3; .* \[0, 2, 4, 6\]"),
        ({"model__dense": "nowhere/at/all"}, r"^model\.dense: nowhere/at/all is no folder"),
    ],
    ids=["uncovered", "overlap", "memory", "budget", "nothing"],
)
def test_what_cannot_be_done_is_one_line_before_work_starts(study, tmp_path, changes, complaint):
    with pytest.raises(UserError, match=complaint) as error:
        study("llama", **changes)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_static_is_searched_once_for_the_ceiling_and_all_routers(study, monkeypatch):
    searched = []

    def search(model, space, token_ids_WT, big_layers):
        searched.append(list(big_layers))
        return static_priors(model, space, token_ids_WT, big_layers)

    monkeypatch.setattr("duollm.study.static_priors", search)
    run = study("llama", until="train-router", router__kinds="[sequential, gains]", router__tokens="300")
    assert len(searched) == 1
    assert {folder.name for folder in (run / "routers").iterdir()} == {
        f"{kind}_k{k}" for kind in ("sequential", "gains") for k in searched[0]
    }
