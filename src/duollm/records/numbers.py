"""How numbers are printed for people."""

from collections.abc import Callable

from duollm.records.bootstrap import Estimate

MINUS = "\N{MINUS SIGN}"
_MISSING = "\N{EN DASH}"
_NOT_MEASURED = "not measured"


def nats(value: float | None, decimals: int = 3) -> str:
    """Format a loss, a difference or a share."""
    return _MISSING if value is None else f"{value:.{decimals}f}".replace("-", MINUS)


def percent(value: float) -> str:
    """Format a share as a whole percentage."""
    return f"{value:.0%}".replace("-", MINUS)


def tenths(share: float) -> str:
    """Format a share as a percentage with one decimal."""
    return f"{share:.1%}".replace("-", MINUS)


def whole(value: float) -> str:
    """Format a count."""
    return f"{value:.0f}"


def brackets(measured: Estimate, form: Callable[[float], str] = nats) -> str:
    """Format the interval of an estimate."""
    return f"[{form(measured.low)}, {form(measured.high)}]"


def with_interval(measured: Estimate | None, form: Callable[[float], str] = nats) -> str:
    """Format an estimate and its interval, or say that it was not measured."""
    return _NOT_MEASURED if measured is None else f"{form(measured.value)} {brackets(measured, form)}"
