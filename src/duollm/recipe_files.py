"""Reading and writing recipes: YAML files, overrides from the command line, one line for what is wrong."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from duollm import strict_yaml
from duollm.config import Recipe
from duollm.errors import UserError, did_you_mean


def recipe_of(run: Path) -> Recipe:
    """Read the recipe of a run folder.

    Raises:
        UserError: the folder is none of a run.
    """
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run}: no run folder (no config.yaml); make one with `duollm study`")
    return load_recipe(run / "config.yaml")


def load_recipe(path: Path | None, overrides: Mapping[str, str] | None = None) -> Recipe:
    """Read a YAML recipe and apply overrides such as {"pretrain.tokens": "5e5"}.

    Raises:
        UserError: unreadable file, unknown key, illegal value; the message names the key and what is allowed.
    """
    values: dict[str, Any] = _read_yaml(path) if path else {}
    overrides = overrides or {}
    for key, text in overrides.items():
        section, _, name = key.rpartition(".")
        owner = values.setdefault(section, {}) if section else values
        if not isinstance(owner, dict):
            raise UserError(f"--{key}: {section} is not a section")
        owner[name] = _parse_override(key, text)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        key, message = explain(error)
        overridden = [name for name in overrides if f"{key}.".startswith(f"{name}.")]
        place = f"--{overridden[0]}" if overridden else ": ".join(filter(None, (str(path or ""), key)))
        raise UserError(f"{place}: {message}" if place else message) from None


def to_yaml(recipe: Recipe) -> str:
    """Return the resolved recipe, every key present, as YAML."""
    return strict_yaml.dump(recipe.model_dump(mode="json"))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = strict_yaml.load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe; the shipped ones are in recipes/") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a readable YAML file: it is not UTF-8; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if values is not None and not isinstance(values, dict):
        raise UserError(f"{path}: a recipe is a mapping of sections, got {type(values).__name__}")
    return {key: value for key, value in (values or {}).items() if value is not None or key in ("name", "seed")}


def _parse_override(key: str, text: str) -> Any:
    """Read a value from the command line: keys that take text keep it as written unless quoted, others are YAML."""
    if not text.strip():
        raise UserError(f"--{key}: an empty value was given (an unset shell variable?); give a value, or leave it out")
    if _takes_text(key) and text[0] not in "'\"" and text not in ("null", "Null", "NULL", "~"):
        return text
    try:
        return strict_yaml.load_argument(text)
    except UserError as error:
        fault = f"--{key}: {strict_yaml.shown(text)} is not a YAML value: {error}"
        raise UserError(f"{fault}; quote it, or write lists as [2,4]") from None


def _takes_text(key: str) -> bool:
    section, _, name = key.rpartition(".")
    owner: Any = Recipe.model_fields[section].annotation if section in Recipe.model_fields else Recipe
    field = getattr(owner, "model_fields", {}).get(name)
    return field is not None and field.annotation in (str, str | None)


def explain(error: ValidationError) -> tuple[str, str]:
    """Return the key and one line for the first problem of a ValidationError."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        section: Any = Recipe
        for part in path[:-1]:
            section = section.model_fields[part].annotation
        return key, f"unknown key; {did_you_mean(path[-1], section.model_fields)}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return key, message
    given = first["input"]
    return key, f"{message}, got {strict_yaml.shown(given)}{strict_yaml.how_to_write(first['type'], given)}"
