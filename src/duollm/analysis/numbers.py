"""How numbers are printed for people."""

from collections.abc import Callable
from typing import Any

from duollm.analysis.statistics import Estimate

_MINUS = "\N{MINUS SIGN}"
_MISSING = "\N{EN DASH}"
_NOT_MEASURED = "not measured"


def nats(value: float | None, decimals: int = 3) -> str:
    """Format a loss, a difference or a share."""
    return _MISSING if value is None else f"{value:.{decimals}f}".replace("-", _MINUS)


def percent(value: float) -> str:
    """Format a share as a whole percentage."""
    return f"{value:.0%}".replace("-", _MINUS)


def whole(value: float) -> str:
    """Format a count."""
    return f"{value:.0f}"


def estimate(row: dict[str, Any], value: str) -> str:
    """Format `row[value]` with its interval, or say that it was not measured."""
    if row[value] is None:
        return _NOT_MEASURED
    return with_interval(Estimate(row[value], row["low"], row["high"]))


def with_interval(measured: Estimate | None, form: Callable[[float], str] = nats) -> str:
    """Format an estimate and its interval, or say that it was not measured."""
    if measured is None:
        return _NOT_MEASURED
    return f"{form(measured.value)} [{form(measured.low)}, {form(measured.high)}]"
