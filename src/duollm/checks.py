"""Whether a study can carry out a recipe: the configuration of its model, and what that model allows."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from duollm.config import ModelConfig, Recipe
from duollm.convert.saving import is_duo
from duollm.data.tokenizer import load_tokenizer
from duollm.errors import UserError, in_a_line
from duollm.models.branch import Branch
from duollm.models.configuration_duo import DuoConfig
from duollm.models.conversion import read_dense_config
from duollm.models.families import dense_config, duo_config, family_of
from duollm.oracle.plan import SearchPlan, check_memory, check_settings
from duollm.routers.registry import check_kinds


def given_config(recipe: Recipe) -> DuoConfig | None:
    """Read the configuration of the model that a recipe names, also from the hub; None if the recipe trains its own.

    Raises:
        UserError: there is none that can be read, or it is of a family that is not supported.
    """
    model = recipe.model
    if not (model.path or model.dense):
        return None
    try:
        if model.path:
            if not Path(model.path, "config.json").is_file():
                raise ValueError(f"{model.path} holds no config.json; give the folder of a saved model")
            return DuoConfig.from_json_file(Path(model.path, "config.json"))
        folder = str(model.dense)
        if is_duo(Path(folder)):
            dense = dense_config(DuoConfig.from_json_file(Path(folder, "config.json")), Branch.BIG)
        else:
            dense = read_dense_config(folder)
        return duo_config(dense, model.small_intermediate_size, model.skip_scope)
    except (OSError, ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        key, given, fault = "path" if model.path else "dense", model.path or model.dense, " ".join(str(error).split())
        raise UserError(f"model.{key}: {fault if str(given) in fault else f'{given}: {fault}'}") from None


def completed(recipe: Recipe, sizes: DuoConfig | ModelConfig) -> Recipe:
    """Return the recipe with the budgets of its routers in layers, where it gives them as shares."""
    router, layers = recipe.router, sizes.num_hidden_layers
    if router.shares is None:
        return recipe
    with _names_section("oracle"):
        possible = SearchPlan(recipe.oracle, layers, recipe.data.sequence_length).space.big_layers
    possible = possible[1:-1] or possible  # at the fewest and the most there is nothing to choose
    nearest = {min(possible, key=lambda big: abs(big - share * layers)) for share in router.shares}
    return recipe.model_copy(update={"router": router.model_copy(update={"big_layers": sorted(nearest)})})


def check_recipe(recipe: Recipe, sizes: DuoConfig | ModelConfig, runs: bool = False) -> None:
    """Refuse settings that a study could not carry out, before it works for hours.

    Args:
        sizes: those of the model.
        runs: whether it is to run on this machine, so that it must fit its memory.

    Raises:
        UserError: the message begins with a key of the recipe.
    """
    model = recipe.model.path or recipe.model.dense
    given = f"the model in {model}" if model else "this model"
    length, layers, positions = recipe.data.sequence_length, sizes.num_hidden_layers, sizes.max_position_embeddings
    with _names_section("router"):
        check_kinds(recipe.router, length)
    if length > positions:
        raise UserError(f"data.sequence_length ({length}) must not exceed the {positions} positions of {given}")
    with _names_section("oracle"):
        check_settings(recipe.oracle, sizes, length)
        if runs and isinstance(sizes, DuoConfig):
            check_memory(recipe.oracle, sizes, length)
    if runs:
        _check_labels(recipe)
    recipe.ceiling.depths_in(layers)
    possible = SearchPlan(recipe.oracle, layers, length).space.big_layers
    for big in recipe.router.big_layers:
        if not 0 <= big <= layers:
            raise UserError(f"router.big_layers holds {big}; {given} has {layers} layers")
        if big not in possible:
            raise UserError(f"router.big_layers holds {big}; the oracle's groups of layers allow {possible}")


def _check_labels(recipe: Recipe) -> None:
    """Refuse a model that cannot give the labels of a study, before the study works for hours.

    Raises:
        UserError: it cannot be read, reads fewer tokens than a window has, or has another tokenizer.
    """
    given, own = recipe.oracle.labels_from, recipe.data.tokenizer or recipe.model.dense
    if given is None:
        return
    if own is None:
        raise UserError(
            f"oracle.labels_from: {given} must have the tokenizer of the data, and this study trains one; "
            "name it in data.tokenizer"
        )
    try:
        theirs = load_tokenizer(given).get_vocab()
        config = AutoConfig.from_pretrained(given)
        if config.model_type != DuoConfig.model_type:
            family_of(config.model_type)
    except (UserError, OSError, ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise UserError(f"oracle.labels_from: {in_a_line(error)}") from None
    if theirs != (ours := load_tokenizer(own).get_vocab()):
        raise UserError(
            f"oracle.labels_from: {given} has another tokenizer ({len(theirs)} tokens) than {own} ({len(ours)}); "
            "give a model with the same one"
        )
    if recipe.data.sequence_length > config.max_position_embeddings:
        raise UserError(
            f"oracle.labels_from: {given} reads {config.max_position_embeddings} tokens, "
            f"data.sequence_length is {recipe.data.sequence_length}; make windows shorter"
        )


@contextmanager
def _names_section(section: str) -> Iterator[None]:
    """Complete the name of the setting that a message of the library begins with."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{section}.{error}") from None
