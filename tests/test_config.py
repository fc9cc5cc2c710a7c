import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from duollm.config import Recipe
from duollm.errors import UserError
from duollm.recipe_files import find_recipe, how_to_write, load_recipe, shown, to_yaml


@pytest.fixture
def recipe_file(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


def refusal(path=None, overrides=None):
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_no_file_gives_the_defaults():
    assert load_recipe(None) == Recipe()


def test_a_file_changes_only_what_it_names(recipe_file):
    recipe = load_recipe(recipe_file("pretrain:\n  tokens: 5000\nmodel:\n  # all defaults\n"))
    assert recipe.pretrain.tokens == 5000
    assert recipe.pretrain.batch_size == Recipe().pretrain.batch_size
    assert recipe.model == Recipe().model


def test_overrides_win_over_the_file(recipe_file):
    recipe = load_recipe(recipe_file("pretrain:\n  tokens: 5000\n"), {"pretrain.tokens": "6000", "seed": "3"})
    assert (recipe.pretrain.tokens, recipe.seed) == (6000, 3)


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("pretrain.tokens", "5e5", 500_000),
        ("pretrain.tokens", "2_000", 2000),
        ("pretrain.learning_rate", "3e-4", 3e-4),
        ("pretrain.learning_rate", "1.5E-3", 1.5e-3),
        ("pretrain.learning_rate", "1", 1.0),
        ("pretrain.compile", "true", True),
        ("router.big_layers", "[2,4]", [2, 4]),
        ("pretrain.betas", "[0.8, 0.9]", (0.8, 0.9)),
        ("data.tokenizer", "null", None),
        ("data.tokenizer", "some/folder", "some/folder"),
        ("data.tokenizer", "x #y", "x #y"),
        ("data.tokenizer", "a: b", "a: b"),
        ("data.tokenizer", "*x", "*x"),
        ("data.tokenizer", "007", "007"),
        ("data.tokenizer", "'x y'", "x y"),
        ("data.domains", "[no, 'x #y']", ["no", "x #y"]),
        ("pretrain.compile", "yes", True),
        ("pretrain.compile", "auto", "auto"),
    ],
)
def test_override_values_are_read_as_people_write_them(key, text, expected):
    section, field = key.split(".")
    assert getattr(getattr(load_recipe(None, {key: text}), section), field) == expected


def test_exponents_are_numbers_in_files_too(recipe_file):
    recipe = load_recipe(recipe_file("pretrain: {tokens: 1e6, learning_rate: 3e-4}"))
    assert (recipe.pretrain.tokens, recipe.pretrain.learning_rate) == (1_000_000, 3e-4)


@given(tokens=st.integers(1, 10**12), rate=st.floats(1e-9, 10), layers=st.sets(st.integers(0, 12), min_size=1))
def test_a_saved_recipe_reads_back_equal(tmp_path_factory, tokens, rate, layers):
    recipe = Recipe.model_validate(
        {"pretrain": {"tokens": tokens, "learning_rate": rate}, "oracle": {"big_layers": sorted(layers)}}
    )
    path = tmp_path_factory.mktemp("saved") / "config.yaml"
    path.write_text(to_yaml(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe


def test_a_saved_recipe_shows_every_key(tmp_path):
    (tmp_path / "config.yaml").write_text(to_yaml(Recipe()), encoding="utf-8")
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    for name, field in Recipe.model_fields.items():
        if hasattr(field.annotation, "model_fields"):
            assert set(saved[name]) == set(field.annotation.model_fields)


def test_an_unknown_key_is_answered_with_the_nearest(recipe_file):
    path = recipe_file("pretrain:\n  token: 5\n")
    message = refusal(path)
    assert str(path) in message
    assert "pretrain.token: unknown key" in message
    assert "did you mean 'tokens'?" in message


def test_a_bad_override_is_blamed_on_the_command_line_not_on_the_file(recipe_file):
    path = recipe_file("pretrain:\n  tokens: 5\n")
    message = refusal(path, {"pretrain.tokens": "many"})
    assert message.startswith("--pretrain.tokens: ")
    assert "'many'" in message
    assert refusal(path, {"oracle.big_layers": "[1, x]"}).startswith("--oracle.big_layers: ")


def test_lists_show_how_to_write_them():
    assert "[a, b]" in refusal(None, {"router.big_layers": "2,4"})


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"model.num_attention_heads": "3"}, "must divide hidden_size"),
        ({"model.num_attention_heads": "4", "model.num_key_value_heads": "3"}, "must divide num_attention_heads"),
        ({"pretrain.branch_shares": "[0.5, 0.5, 0.5]"}, "sum to 1"),
        ({"pretrain.branch_shares": "[-0.5, 1, 0.5]"}, ">= 0"),
        ({"pretrain.accumulate": "3"}, "must divide batch_size"),
        ({"pretrain.learning_rate": ".inf"}, "finite"),
        ({"pretrain.tokens": "1.5"}, "1.5"),
        ({"pretrain.precision": "fp8"}, "'fp32'"),
        ({"data.domains": "[prose, prose]"}, "twice"),
        ({"data.validation_share": "0.6", "data.test_share": "0.5"}, "below 1"),
        ({"oracle.big_layers": "[]"}, "at least 1"),
        ({"router.big_layers": "[2, 2]"}, "twice"),
        ({"router.temperatures": "[1, 0]"}, "greater than 0"),
        ({"seed": "-1"}, "greater than or equal to 0"),
        ({"name": "y", "name.first": "x"}, "not a section"),
        ({"pretrain.betas": "[0.1"}, "not a YAML value"),
        ({"pretrain.batch_size": "0100"}, "got '0100'; write 100 or 64"),
        ({"pretrain.batch_size": "0x10"}, "write 16"),
        ({"pretrain.tokens": "true"}, "got true; if 1 is meant, write 1"),
        ({"pretrain.learning_rate": "true"}, "got true"),
        ({"pretrain.compile": "1"}, "must be auto, true or false, got 1"),
        ({"model.tie_word_embeddings": "1"}, "write true or false"),
        ({"pretrain.compile": "often"}, "must be auto, true or false, got often"),
        ({"router.big_layers": "[2, true]"}, "got true"),
        ({"pretrain.betas": "[0.1, 010]"}, "write 10 or 8"),
        ({"pretrain.tokens": "5 # five"}, "'# five' follows the value"),
        ({"pretrain.tokens": "{a: 1, a: 2}"}, "given twice"),
        ({"model.path": ""}, "--model.path: an empty value was given"),
        ({"data.tokenizer": " "}, "--data.tokenizer: an empty value was given"),
        ({"oracle.big_layers": ""}, "--oracle.big_layers: an empty value was given"),
        ({"data.domains": "[prose, '']"}, "an empty text was given"),
        ({"data.domains": "[1]"}, 'in quotes: "1"'),
        ({"seed": "99999999999999999999"}, "less than or equal to 4294967295"),
        ({"model.hidden_size": "99999999999999999999"}, "at most 1e+15"),
        ({"model.num_hidden_layers": "1e9"}, "10000"),
        ({"pretrain.tokens": "9" * 5000}, "not a YAML value"),
        ({"data.domains": "[" * 3000}, "not a YAML value"),
        ({"data.domains": "[prose,]"}, "its last item is empty (an unset shell variable?)"),
        ({"pretrain.betas": "[0.9, 1]"}, "betas must be at least 0 and below 1"),
        ({"pretrain.betas": "[-0.1, 0.9]"}, "betas must be at least 0 and below 1"),
        ({"pretrain.branch_shares": "[0.5, 0.5]"}, "got (0.5, 0.5); give one more value"),
        ({"pretrain.batch_size": "1e12"}, "less than or equal to 1000000"),
        ({"data.vocab_size": "1e12"}, "less than or equal to 10000000"),
        ({"oracle.contexts": "[shared, shared]"}, "contexts holds 'shared' twice"),
        ({"oracle.branches": "[big, big]"}, "branches holds 'big' twice"),
        ({"oracle.more_budgets": "[at-most 1, at-most 1]"}, "more_budgets holds 'at-most 1' twice"),
    ],
)
def test_illegal_values_are_refused_in_one_line(overrides, expected):
    assert expected in refusal(None, overrides)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pretrain:\n  tokens: 5\npretrain:\n  batch_size: 8\n", "'pretrain' is given twice, in lines 1 and 3"),
        ("pretrain:\n  tokens: 5\n  tokens: 6\n", "'tokens' is given twice, in lines 2 and 3"),
        ("model: {path: ''}", "model.path: an empty text was given"),
        ("name: ''", "name: an empty text was given"),
        ("pretrain: {batch_size: 0100}", "got '0100'; write 100 or 64"),
        ("pretrain: {batch_size: '16'}", "got '16'; write 16"),
        ("pretrain: {tokens: }", "pretrain.tokens: Input should be a valid integer, got nothing"),
        ("name: 7", 'in quotes: "7"'),
        ("1: 2", "Keys should be strings"),
        ("seed:", "seed: Input should be a valid integer, got nothing"),
        ("name: ~", "name: Input should be a valid string, got nothing"),
    ],
)
def test_no_setting_of_a_file_is_lost_or_turned_into_another(recipe_file, text, expected):
    path = recipe_file(text)
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert expected in message


def test_a_file_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "latin.yaml").write_bytes("name: Größe".encode("latin-1"))
    assert "not UTF-8" in refusal(tmp_path / "latin.yaml")


@pytest.mark.parametrize("name", ["1e5", "yes", "0100", "2024-01-01", "null", "x #y", "[a]", "{{ name }}", "null "])
def test_a_saved_name_reads_back_as_it_is(tmp_path, name):
    (tmp_path / "config.yaml").write_text(to_yaml(Recipe(name=name)), encoding="utf-8")
    assert load_recipe(tmp_path / "config.yaml").name == name


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words", "a: [1", "\x00"])
def test_a_file_that_is_no_recipe_is_refused(recipe_file, text):
    path = recipe_file(text)
    assert str(path) in refusal(path)


def test_a_missing_file_is_refused(tmp_path):
    assert "no such recipe" in refusal(tmp_path / "absent.yaml")


def test_shipped_recipes_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("quick", "quick.yaml", "recipes/quick.yaml"):
        assert find_recipe(name).is_file()


def test_a_recipe_at_the_given_path_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quick.yaml").write_text("seed: 7\n")
    assert load_recipe(find_recipe("quick.yaml")).seed == 7


@pytest.mark.parametrize("name", ["quik", "elsewhere/quick.yaml"])
def test_an_unknown_recipe_is_answered_with_the_shipped_ones(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="did you mean 'quick'"):
        find_recipe(name)


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_recipe(None, {"model.path": "~/duo"}).model.path == str(tmp_path / "duo")
    recipe = load_recipe(None, {"model.dense": "~/dense", "data.tokenizer": "~/tok"})
    assert (recipe.model.dense, recipe.data.tokenizer) == (str(tmp_path / "dense"), str(tmp_path / "tok"))


def test_an_opt_like_model_is_one_key():
    from duollm.models.configuration_duo import DuoConfig

    config = DuoConfig(
        **Recipe.model_validate({"model": {"architecture": "opt"}}).model.duo_fields() | {"vocab_size": 9}
    )
    assert (config.norm, config.positions, config.gated_ffn, config.hidden_act) == ("layer", "learned", False, "relu")
    assert config.mlp_bias
    assert config.attention_bias
    plain = DuoConfig(**Recipe().model.duo_fields() | {"vocab_size": 9})
    assert (plain.norm, plain.positions, plain.gated_ffn) == ("rms", "rotary", True)


def test_a_list_of_billions_of_references_is_shown_at_once():
    value = ["x"] * 10
    for _ in range(12):
        value = [value] * 10
    assert len(shown(value)) < 250


@pytest.mark.parametrize(
    ("problem", "given", "expected"),
    [
        ("int_type", "0100", "write 100 or 64"),
        ("int_type", "0x10", "write 16"),
        ("int_type", "1:30", "write 90"),
        ("float_type", "500", "write 500"),
        ("int_type", True, "write 1"),
        ("bool_type", 1, "write true or false"),
        ("string_type", False, 'in quotes: "false"'),
        ("tuple_type", "2,4", "[a, b]"),
    ],
)
def test_a_value_of_the_wrong_kind_is_answered_with_how_to_write_it(problem, given, expected):
    assert expected in how_to_write(problem, given)


@pytest.mark.parametrize("given", ["many", "0109x", "[", "9" * 5000])
def test_what_stands_for_no_number_gets_no_advice(given):
    assert how_to_write("int_type", given) == ""
