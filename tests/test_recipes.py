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
    assert plan(recipe).parameters.total > 0


def test_quick_shows_the_defaults():
    assert load_recipe(RECIPES[0].with_name("quick.yaml")) == Recipe()


def test_paper_has_the_sizes_of_the_paper():
    parts = plan(load_recipe(RECIPES[0].with_name("paper.yaml"))).parameters
    assert [round(number / 1e6) for number in (parts.total, parts.big, parts.small, parts.attention)] == [
        1399,
        944,
        59,
        315,
    ]
