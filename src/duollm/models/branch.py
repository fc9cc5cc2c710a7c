"""What a token goes through in place of one layer's FFN."""

from enum import IntEnum


class Branch(IntEnum):
    """A token's choice at one layer, cheapest first (the paper says "module")."""

    SKIP = 0
    SMALL = 1
    BIG = 2


BRANCHES = tuple(Branch)
"""All branches, cheapest first: torch 2.8 cannot trace a loop over the class."""
