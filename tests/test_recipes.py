from pathlib import Path

import pytest

from duollm.plan import plan
from duollm.recipe_files import load_recipe

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


def test_the_documented_recipes_are_shipped():
    assert {path.stem for path in RECIPES} >= {"quick", "paper"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_parses_plans_and_is_named_after_its_file(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert all(row.value >= 0 for row in plan(recipe))


def test_quick_keeps_the_shape_the_claims_are_about_and_enough_documents():
    quick = load_recipe(RECIPES[0].with_name("quick.yaml"))
    assert (quick.model.num_hidden_layers, quick.oracle.search) == (12, "exact")
    assert quick.data.domains == ["prose", "code"]
    assert (quick.oracle.documents, quick.evaluate.documents) == (24, 48), "intervals are over documents"
    assert quick.oracle.counted_share == 1, "with static chosen on little text every router looks good"
    assert quick.oracle.resampled_labels
    assert quick.ceiling.enabled
    assert {4, 6, 8} < set(quick.router.big_layers)


RATES = {"pretrain": 7400, "oracle": 18, "gains": 2600, "ceiling": 3300, "executed": 14_000}
"""Tokens per second and stage on two quiet cores of an AMD EPYC without matrix units (docs/LOG.md)."""
OTHER_SECONDS = 60
"""Data, fits and calibration, timing, the page."""


def test_quick_fits_twelve_minutes():
    quick = load_recipe(RECIPES[0].with_name("quick.yaml"))
    length, budgets = quick.data.sequence_length, len(quick.router.big_layers)
    compared = 2 * quick.evaluate.documents * quick.evaluate.windows_per_document * length
    routers, patterns, depths, ways = len(quick.router.kinds) * budgets, 3 * 11 + 2, 5, 2
    validated = 64 * length * depths * budgets * ways
    executions = compared * (ways * (routers + 2 * budgets + depths - 1) + patterns) + validated
    tokens = {
        "pretrain": quick.pretrain.tokens,
        "oracle": 2 * quick.oracle.documents * length,
        "gains": quick.router.tokens_for_all,
        "ceiling": quick.ceiling.tokens,
        "executed": executions,
    }
    assert OTHER_SECONDS + sum(tokens[stage] / rate for stage, rate in RATES.items()) < 720


def test_paper_has_the_sizes_of_the_paper():
    rows = plan(load_recipe(RECIPES[0].with_name("paper.yaml")))
    millions = {row.label: round(row.value / 1e6) for row in rows if row.table == "parameters"}
    assert millions == {
        "total": 1399,
        "big": 944,
        "small": 59,
        "attention": 315,
        "embedding": 82,
        "norms": 0,
        "head": 0,
    }
