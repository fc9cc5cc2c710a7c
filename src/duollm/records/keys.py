"""Names of measured policies, from the files of a run to its page."""

import re
from typing import NamedTuple

ALL_SMALL = "all-small"
ALL_BIG = "all-big"
ORACLE = "oracle"
EXECUTED = "executed-together"
"""The oracle's routes of all tokens in one forward pass."""
STATIC = "static"
"""The best pattern (one route for all tokens) of a budget."""
RANDOM = "random-patterns"
CEILING = "ceiling"
"""The predictable ceiling: the best that a chooser without the label reached."""
SHUFFLED = "shuffled"
"""The control of the ceiling: the deepest predictor, fitted to the gains of other tokens."""

PATTERNS_DRAWN = 100
BEST_PATTERNS = f"best-of-{PATTERNS_DRAWN}-patterns"
RANDOM_ROUTES_CONTEXT = "shared"

DRAWN_ORACLE = "drawn-oracle"
"""`on_drawn(ORACLE)`."""
DRAWN_SECOND = "drawn-second"
"""The routes of `DRAWN_ORACLE` on a second draw."""
DRAWN_STATIC = "drawn-static"
"""Static on drawn labels, in expectation."""
NET_ORACLE = "net-oracle"
"""The oracle, raised by what the same search gains on drawn labels over static."""

AVERAGE, EXACT = "average", "exact"
"""How a budget is spent: on average, or on every token."""


class Key(NamedTuple):
    """A policy at a budget.

    Attributes:
        big_layers: k, the budget.
        kind: the kind of router; None for a policy that is not a trained router.
        spend: how a router spends its budget.
        context: which routes earlier tokens take, for policies that were searched.
    """

    policy: str
    big_layers: int
    kind: str | None = None
    spend: str | None = None
    context: str | None = None

    @property
    def variant(self) -> str:
        """The policy or kind of router without its budget; see the function of the same name."""
        return variant(self.policy, self.kind, self.spend)

    @property
    def auxiliary(self) -> bool:
        """Whether the policy only serves other quantities and is in no table of losses."""
        return self.policy.startswith(("drawn-", "predictor-", "unit"))


def variant(policy: str, kind: str | None, spend: str | None) -> str:
    """Return the name without the budget: a policy, or a kind of router, with its way of spending if that is exact."""
    if kind is None:
        return policy
    return f"{kind}, exact" if spend == EXACT else kind


def numbers_in(policy: str) -> list[int]:
    """Return the numbers that one of the functions below put into a name."""
    return [int(digits) for digits in re.findall(r"\d+", policy)]


def of_unit(policy: str, unit: int) -> str:
    """Return the name of a search that chose one route for `unit` neighbouring tokens."""
    return policy if unit == 1 else f"unit{unit}-{policy}"


def ramp_oracle(first: int, last: int) -> str:
    """Return the name of the oracle whose budget slides from `first` to `last` big layers over the window."""
    return f"oracle-ramp{first}to{last}"


def on_drawn(policy: str) -> str:
    """Return the name of an oracle's search for a label drawn from the all-big prediction."""
    return f"drawn-{policy}"


def best_routes(drawn: int) -> str:
    """Return the name of the best of `drawn` random routes per token."""
    return f"best-of-{drawn}-routes"


def ceiling_policy(spend: str, shuffled: bool = False) -> str:
    """Return the name of the ceiling, or of its control, with its way of spending if that is exact."""
    return _spending(f"{CEILING}-{SHUFFLED}" if shuffled else CEILING, spend)


def predictor_policy(predictor: str, spend: str) -> str:
    """Return the name of one predictor of the ceiling, with its way of spending if that is exact."""
    return ceiling_policy(spend, shuffled=True) if predictor == SHUFFLED else _spending(f"predictor-{predictor}", spend)


def _spending(name: str, spend: str) -> str:
    return f"{name}-{EXACT}" if spend == EXACT else name
