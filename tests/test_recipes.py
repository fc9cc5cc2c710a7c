from pathlib import Path

import pytest

from duollm.config import Recipe, load_recipe
from duollm.plan import plan

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


def test_the_documented_recipes_are_shipped():
    assert {path.stem for path in RECIPES} >= {"quick", "paper"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_parses_plans_and_is_named_after_its_file(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert all(row.value >= 0 for row in plan(recipe))


def test_quick_shows_the_defaults():
    assert load_recipe(RECIPES[0].with_name("quick.yaml")) == Recipe()


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
