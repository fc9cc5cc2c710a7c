"""Values of command-line options: numbers in a range, names with commas between."""

from argparse import ArgumentTypeError
from collections.abc import Callable

LARGEST_COUNT = 10**9


def whole_number(lowest: int = 1, highest: int = LARGEST_COUNT) -> Callable[[str], int]:
    """Return a reader of whole numbers in a range, both ends included, for argparse's `type`."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = lowest - 1
        if value < lowest:
            raise ArgumentTypeError(f"takes a whole number from {lowest}, got {text[:50]!r}")
        if value > highest:
            raise ArgumentTypeError(f"takes a whole number up to {highest:,}, got {text[:50]!r}")
        return value

    return read


def number(lowest: float, highest: float) -> Callable[[str], float]:
    """Return a reader of numbers in a range, both ends included, for argparse's `type`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not lowest <= value <= highest:
            raise ArgumentTypeError(f"takes a number from {lowest:g} to {highest:g}, got {text[:50]!r}")
        return value

    return read


def names(text: str) -> str:
    """Check names with commas between; spaces around a name go.

    Raises:
        ArgumentTypeError: a name is empty.
    """
    found = [name.strip() for name in text.split(",")]
    if not all(found):
        raise ArgumentTypeError(f"{text!r} holds an empty name; write names with a comma between two, such as a,b")
    return ",".join(found)


def whole_numbers(text: str) -> list[int]:
    """Read whole numbers with commas between, perhaps in square brackets.

    Raises:
        ArgumentTypeError: something else is between the commas.
    """
    try:
        return [int(part) for part in text.strip("[]").split(",")]
    except ValueError:
        raise ArgumentTypeError(f"takes whole numbers with commas between, such as 4,6; got {text[:50]!r}") from None
