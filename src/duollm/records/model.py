"""Describes the model of a run from its files, without loading it."""

import json
from math import prod
from pathlib import Path
from typing import Any

import yaml

from duollm import files
from duollm.errors import UserError
from duollm.records.tokens import Tokens

_SIZES = ("hidden_size", "intermediate_size", "small_intermediate_size", "num_attention_heads", "vocab_size")


def describe_model(run: Path, oracle: Tokens) -> dict[str, Any]:
    """Return the model's sizes. Sizes that the run folder does not hold (of a model kept elsewhere) are left out.

    A model with LayerNorm and learned positions has `architecture` "opt".
    """
    branches = [branch.name.lower() for branch in oracle.space.branches]
    description: dict[str, Any] = {"num_layers": oracle.space.num_layers, "branches": branches}
    if len(oracle.space.big_layers) <= oracle.space.num_layers:
        description["possible_big_layers"] = oracle.space.big_layers
    config, weights = run / "model" / "config.json", sorted((run / "model").glob("*.safetensors"))
    if config.exists():
        known = read_json(config)
        description |= {key: value for key, value in known.items() if key in _SIZES}
        if (known.get("norm"), known.get("positions")) == ("layer", "learned"):
            description["architecture"] = "opt"
    if training_tokens := _training_tokens(run / "config.yaml"):
        description["training_tokens"] = training_tokens
    if weights:
        description["parameters"] = sum(_count_parameters(file) for file in weights)
    return description


def _training_tokens(recipe: Path) -> int | None:
    """Return for how many tokens the recipe had the model trained; None if it took one or is not there."""
    if not recipe.exists():
        return None
    settings = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    return None if settings["model"]["path"] else int(settings["pretrain"]["tokens"])


def _count_parameters(file: Path) -> int:
    """Count from the header of a safetensors file: its length in 8 bytes, then JSON with the shapes."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return sum(prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")


def read_json(path: Path) -> Any:
    """Read a JSON file of a run folder.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        return files.read_json(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; is {path.parent} a run folder of duollm?") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); give a run folder of duollm") from None
