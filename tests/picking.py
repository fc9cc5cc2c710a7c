"""One row of a list of results."""

from collections.abc import Iterable
from typing import Any


def pick(rows: Iterable[Any], **wanted: Any) -> Any:
    """Return the only row whose fields are as wanted."""
    [found] = [row for row in rows if all(getattr(row, name) == value for name, value in wanted.items())]
    return found
