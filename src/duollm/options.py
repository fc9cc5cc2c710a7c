"""Options of the command line: the parser, and readers of their values."""

import argparse
import re
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from contextlib import suppress
from difflib import get_close_matches
from typing import Any, Literal, NoReturn, TypeVar

from duollm.errors import UserError

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
            value = getattr(options, action.dest, None)
            shown = action.option_strings[0] if action.option_strings else action.metavar
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str) and action.dest != "prompt":
                    refuse_empty(shown, text)
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


def refuse_empty(name: Any, text: str) -> None:
    """Refuse an empty text, as of an unset shell variable: a verb would read it as not given, or as this folder.

    Raises:
        UserError: the message begins with the option's name.
    """
    if not text.strip():
        raise UserError(f"{name}: an empty value was given (an unset shell variable?); give a value, or leave it out")


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
