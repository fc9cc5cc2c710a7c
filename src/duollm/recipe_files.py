"""Reading and writing recipes: YAML files, an option for every key, one line for what is wrong."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from reprlib import Repr
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import ValidationError

from duollm import strict_yaml
from duollm.config import Recipe
from duollm.errors import UserError, did_you_mean
from duollm.options import refuse_empty

_SHORT = Repr()  # a few references make a list of billions of items
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxdict = 4, 20, 20, 20
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 400

DEFAULT_RECIPE = "recipes/quick.yaml"
SHIPPED_RECIPES = (Path(__file__).parent / "recipes", Path(__file__).parents[2] / "recipes")
"""Where the shipped recipes are: in an installed wheel, and in a checkout."""


def find_recipe(given: str) -> Path:
    """Return the recipe at path `given`, else the shipped one of that name ("quick", "recipes/quick.yaml").

    Raises:
        UserError: there is neither.
    """
    path = Path(given)
    if path.is_file():
        return path
    shipped = {path.stem: path for folder in SHIPPED_RECIPES for path in folder.glob("*.yaml")}
    if path.stem in shipped and path.parent in (Path(), Path("recipes")):
        return shipped[path.stem]
    raise UserError(f"{given}: no such recipe; give a path or a shipped one: {did_you_mean(path.stem, shipped)}")


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
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        key, message = explain(error)
        overridden = [name for name in overrides if f"{key}.".startswith(f"{name}.")]
        place = f"--{overridden[0]}" if overridden else ": ".join(filter(None, (str(path or ""), key)))
        raise UserError(f"{place}: {message}" if place else message) from None
    if recipe.router.shares and "router.big_layers" in overrides:
        raise UserError("router.big_layers: the recipe gives shares, which take its place; set router.shares to null")
    return recipe


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
    refuse_empty(f"--{key}", text)
    if _takes_text(key) and text[0] not in "'\"" and text not in ("null", "Null", "NULL", "~"):
        return text
    try:
        return strict_yaml.load_argument(text)
    except UserError as error:
        fault = f"--{key}: {shown(text)} is not a YAML value: {error}"
        raise UserError(f"{fault}; quote it, or write lists as [2,4]") from None


def _takes_text(key: str) -> bool:
    section, _, name = key.rpartition(".")
    owner: Any = Recipe.model_fields[section].annotation if section in Recipe.model_fields else Recipe
    field = getattr(owner, "model_fields", {}).get(name)
    return field is not None and field.annotation in (str, str | None)


def add_recipe_options(parser: argparse.ArgumentParser) -> None:
    """Add RECIPE and an option for every key of a recipe; keys that are not given leave no trace."""
    parser.usage = f"{parser.prog} [RECIPE] [options] [--section.key VALUE ...]"
    file = "a YAML file (default: %(default)s)"
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", default=DEFAULT_RECIPE, help=file)
    whole = parser.add_argument_group(
        "recipe", "Values are YAML: 5e5, 3e-4, true, null, [2,4]. Text needs no quotation marks."
    )
    for name, field in Recipe.model_fields.items():
        inner_fields = getattr(field.annotation, "model_fields", None)
        if inner_fields is None:
            _add_key(whole, name, field)
            continue
        section = parser.add_argument_group(name, getattr(field.annotation, "__doc__", None))
        for inner_name, inner in inner_fields.items():
            _add_key(section, f"{name}.{inner_name}", inner)


def _add_key(group: Any, key: str, field: Any) -> None:
    text = field.description.replace("\n", " ").replace("%", "%%")
    default = "" if field.default is None else f" (default: {_as_yaml(field.default)})"
    group.add_argument(
        f"--{key}", metavar=_type_name(field.annotation), default=argparse.SUPPRESS, help=f"{text}{default}"
    )


def _as_yaml(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_as_yaml, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _type_name(annotation: Any) -> str:
    """Say what a key takes: INTEGER, ffn|layer, [NUMBER,NUMBER], ..."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "|".join(inner)
    if origin in (Union, UnionType):
        return "|".join(_type_name(each) for each in inner if each is not NoneType)
    if origin is Annotated:
        return _type_name(inner[0])
    if origin is list:
        return f"[{_type_name(inner[0])},...]"
    if origin is tuple:
        return f"[{','.join(map(_type_name, inner))}]"
    if origin is dict:
        return f"{{{_type_name(inner[0])}: {_type_name(inner[1])}, ...}}"
    return {bool: "true|false", int: "INTEGER", float: "NUMBER", str: "TEXT"}[annotation]


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
    return key, f"{message}, got {shown(given)}{how_to_write(first['type'], given)}"


def shown(value: Any) -> str:
    """Return a value as it is written, cut where it is long."""
    text = "nothing" if value is None else str(value).lower() if isinstance(value, bool) else _SHORT.repr(value)
    return text if len(text) < 200 else f"{text[:200]}..."


def how_to_write(problem: str, given: Any) -> str:
    """Say how to write a value of the right kind, where the wrong one tells.

    Args:
        problem: pydantic's name for it, such as "int_type".
        given: the value of the wrong kind.
    """
    if problem in ("list_type", "tuple_type"):
        return "; write it as [a, b]"
    if problem == "missing":  # of a list of fixed length
        return "; give one more value"
    if problem == "bool_type":
        return "; write true or false"
    if problem == "string_type" and isinstance(given, int | float):
        return f'; if that is a name, write it in quotes: "{shown(given)}"'
    if problem in ("int_type", "float_type") and isinstance(given, bool):
        return f"; if {int(given)} is meant, write {int(given)}"
    if problem in ("int_type", "float_type") and isinstance(given, str):
        numbers = _readings(given)
        return f"; write {' or '.join(map(str, numbers))}" if numbers else ""
    return ""


def _readings(text: str) -> list[int | float]:
    """The numbers that a text such as 0100, 0x10 or 1:30 stands for, in decimals and in YAML 1.1."""
    try:
        found = [int(text)] if text.isdecimal() else []
        found.append(yaml.safe_load(text))
    except (ValueError, yaml.YAMLError):
        return []
    return [number for number in dict.fromkeys(found) if type(number) in (int, float)]
