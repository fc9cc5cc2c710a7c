"""How numbers are printed on the page."""

from duollm.report.style import Row

_MINUS = "\N{MINUS SIGN}"
_MISSING = "\N{EN DASH}"


def nats(value: float | None) -> str:
    """Format a loss, a difference or a share to three decimals."""
    return _MISSING if value is None else f"{value:.3f}".replace("-", _MINUS)


def percent(value: float) -> str:
    """Format a share as a whole percentage."""
    return f"{value:.0%}".replace("-", _MINUS)


def estimate(row: Row, value: str) -> str:
    """Format `row[value]` with its interval, or say that it was not measured."""
    return "not measured" if row[value] is None else f"{nats(row[value])} [{nats(row['low'])}, {nats(row['high'])}]"
