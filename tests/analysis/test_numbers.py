import pytest

from duollm.analysis.numbers import estimate, nats, percent, with_interval
from duollm.analysis.statistics import Estimate


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (nats(-0.0126), "\N{MINUS SIGN}0.013"),
        (nats(2.5, 1), "2.5"),
        (nats(None), "\N{EN DASH}"),
        (percent(-0.126), "\N{MINUS SIGN}13%"),
        (with_interval(Estimate(0.1, -0.2, 0.3)), "0.100 [\N{MINUS SIGN}0.200, 0.300]"),
        (with_interval(Estimate(0.1, -0.2, 0.3), percent), "10% [\N{MINUS SIGN}20%, 30%]"),
        (with_interval(None), "not measured"),
        (estimate({"x": 1.0, "low": 0.5, "high": 2.0}, "x"), "1.000 [0.500, 2.000]"),
        (estimate({"x": None}, "x"), "not measured"),
    ],
)
def test_numbers_are_printed_with_real_signs(text, expected):
    assert text == expected
