"""What a token goes through in place of one layer's FFN."""

from enum import IntEnum


class Branch(IntEnum):
    """A token's choice at one layer, cheapest first (the paper says "module")."""

    SKIP = 0
    SMALL = 1
    BIG = 2
