import pytest

from duollm.records.bootstrap import Estimate
from duollm.records.numbers import brackets, nats, percent, whole, with_interval


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
        (brackets(Estimate(1.0, 0.5, 2.0), whole), "[0, 2]"),
    ],
)
def test_numbers_are_printed_with_real_signs(text, expected):
    assert text == expected
