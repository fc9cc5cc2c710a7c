"""The model from whose prediction labels are drawn, if it is another one than the one that is searched."""

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig

from duollm.config import OracleConfig, Recipe
from duollm.convert.dense import open_dense
from duollm.data.tokenizer import load_tokenizer
from duollm.errors import UserError, in_a_line
from duollm.models.families import family_of
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.oracle.noise import LabelSource


def check_labels(recipe: Recipe) -> None:
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
        if config.model_type != DuoForCausalLM.config_class.model_type:
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


def open_labels(config: OracleConfig, searched: DuoForCausalLM) -> LabelSource:
    """Return the source of the labels that a recipe asks for.

    Raises:
        UserError: the model cannot be loaded.
    """
    if config.labels_from is None:
        return LabelSource(None, config.labels_temperature)
    try:
        model = open_dense(config.labels_from, 1, "ffn", seed=0, dtype=searched.dtype)
    except UserError as error:
        raise UserError(f"oracle.labels_from: {error}") from None
    nn.Module.to(model, searched.device)
    return LabelSource(model, config.labels_temperature)
