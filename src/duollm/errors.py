"""The one error style: a line that says what was given, what is allowed and how to mend it."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Bad input. The command line prints it as one line and exits with code 2."""


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """Return "allowed: a, b, c", led by the nearest allowed name if one is close to `given`."""
    allowed = sorted(allowed)
    near = get_close_matches(given, allowed, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}allowed: {', '.join(allowed)}"
