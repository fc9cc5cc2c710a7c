"""Options of the command line: the parser, readers of values, and an option for every key of a recipe."""

import argparse
import re
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

from duollm.errors import UserError, did_you_mean

LARGEST_COUNT = 10**9

Value = TypeVar("Value")
Number = TypeVar("Number", int, float)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are UserErrors that name the nearest option."""

    def parse(self, given: Sequence[str]) -> argparse.Namespace:
        """Parse the arguments of one verb.

        Raises:
            UserError: an unknown option, one argument too many, or a value that is not allowed.
        """
        options, unknown = self.parse_known_args(given)
        for argument in unknown:
            if argument.startswith("-"):
                raise UserError(f"unknown option {argument.partition('=')[0]}; {self._nearest(argument)}")
        if unknown:
            raise UserError(f"{self.prog} takes no further argument, got {unknown[0]!r}; {self._see_help()}")
        words = [word.partition("=")[0] for word in given[: list(given).index("--") if "--" in given else None]]
        for name, action in self._option_string_actions.items():
            if words.count(name) > 1 and isinstance(action, argparse._StoreAction):
                raise UserError(f"{name} is given {words.count(name)} times; keep one of them")
        for action in self._actions:
            self._check_given(action, getattr(options, action.dest, None))
        return options

    def name_option(self, message: str) -> str:
        """Put the option's name in place of the argument that a library's message begins with.

        "max_new_tokens must ..." becomes "--max-new-tokens must ...", and for a verb that takes a recipe
        "sequence_length must ..." becomes "data.sequence_length must ...". A name that several sections have stays.
        """
        begins = re.match(r"([a-z]+(?:_[a-z]+)*)[ :]", message)
        keys = [action.dest for action in self._actions if begins and action.dest.rpartition(".")[2] == begins[1]]
        if begins is None or len(keys) != 1:
            return message
        [flag] = [action.option_strings for action in self._actions if action.dest == keys[0]]
        name = keys[0] if "." in keys[0] or not flag else flag[0]
        return f"{name}{message[begins.end(1) :]}"

    def _check_given(self, action: argparse.Action, value: Any) -> None:
        """Refuse an empty text, as of an unset shell variable: a verb would read it as not given, or as this folder."""
        texts = [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, str)]
        if action.dest != "prompt" and not all(text.strip() for text in texts):
            name = action.option_strings[0] if action.option_strings else action.metavar
            raise UserError(
                f"{name}: an empty value was given (an unset shell variable?); give a value, or leave it out"
            )

    def _print_message(self, message: str, file: Any = None) -> None:
        """argparse says nothing of a help that could not be printed."""
        print(message, end="", file=file)

    def error(self, message: str) -> NoReturn:
        """Refuse what argparse cannot parse."""
        raise UserError(f"{message}; {self._see_help()}")

    def _nearest(self, argument: str) -> str:
        name = argument.partition("=")[0]
        options = [option for option in self._option_string_actions if option.startswith("--")]
        same_key = [option for option in options if option.rpartition(".")[2] == name.lstrip("-")]
        near = same_key or get_close_matches(name, options, n=1)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        return f"{hint}{self._see_help()}"

    def _see_help(self) -> str:
        return f"{self.prog} --help lists all options"


class WideHelp(argparse.HelpFormatter):
    """Help with room for the names of recipe keys."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34)


def whole_number(lowest: int = 1, highest: int = LARGEST_COUNT) -> Callable[[str], int]:
    """Return a reader of whole numbers in a range, both ends included, for argparse's `type`."""

    return _in_range(int, lowest, highest, f"a whole number from {lowest:,} to {highest:,}")


def number(lowest: float, highest: float) -> Callable[[str], float]:
    """Return a reader of numbers in a range, both ends included, for argparse's `type`."""

    return _in_range(float, lowest, highest, f"a number from {lowest:g} to {highest:g}")


def _in_range(kind: Callable[[str], Number], lowest: Number, highest: Number, range_: str) -> Callable[[str], Number]:
    def read(text: str) -> Number:
        with suppress(ValueError):
            if lowest <= (value := kind(text)) <= highest:
                return value
        raise ArgumentTypeError(f"takes {range_}, got {text[:50]!r}")

    return read


def listed(read: Callable[[str], Value], brackets: bool = False) -> Callable[[str], list[Value]]:
    """Return a reader of values with commas between; `read` reads each. `brackets`: [4,6] is 4,6 too."""

    def read_all(text: str) -> list[Value]:
        found = [part.strip() for part in (text.strip("[]") if brackets else text).split(",")]
        if not all(found):
            raise ArgumentTypeError(f"{text[:50]!r} holds an empty value; put one comma between two, as in a,b")
        for place, part in enumerate(found):
            if part in found[:place]:
                raise ArgumentTypeError(f"{text[:50]!r} holds {part!r} twice")
        return [read(part) for part in found]

    return read_all


def rows(text: str) -> int | Literal["auto"]:
    """Read a number of rows per batch, or auto."""
    if text.startswith("auto:"):
        raise ArgumentTypeError(f"takes a whole number or auto, got {text[:50]!r}; write auto, which searches once")
    return "auto" if text == "auto" else whole_number()(text)


def add_recipe_options(parser: argparse.ArgumentParser, default: str) -> None:
    """Add RECIPE and an option for every key of a recipe; keys that are not given leave no trace."""
    from duollm.config import Recipe

    parser.usage = f"{parser.prog} [RECIPE] [options] [--section.key VALUE ...]"
    parser.add_argument(
        "recipe", nargs="?", metavar="RECIPE", default=default, help="a YAML file (default: %(default)s)"
    )
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
