from argparse import ArgumentTypeError

import pytest

from duollm.options import names, number, whole_number, whole_numbers


def test_values_in_range_are_read():
    assert whole_number(0, 7)("7") == 7
    assert number(0.5, 2)("1.5") == 1.5
    assert names(" prose, ./my code ") == "prose,./my code"


@pytest.mark.parametrize(
    ("read", "text", "expected"),
    [
        (whole_number(), "0", "from 1, got '0'"),
        (whole_number(), "many", "from 1, got 'many'"),
        (whole_number(), "1.5", "from 1, got '1.5'"),
        (whole_number(), "99999999999999999999", "up to 1,000,000,000, got"),
        (whole_number(), "9" * 5000, "takes a whole number"),
        (number(0.5, 2), "nan", "from 0.5 to 2, got 'nan'"),
        (number(0.5, 2), "inf", "from 0.5 to 2"),
        (number(0.5, 2), "x", "from 0.5 to 2"),
        (names, "prose,", "'prose,' holds an empty name"),
        (names, "", "holds an empty name"),
        (names, "a, ,b", "holds an empty name"),
    ],
)
def test_other_values_are_refused_with_what_is_allowed(read, text, expected):
    with pytest.raises(ArgumentTypeError) as caught:
        read(text)
    assert expected in str(caught.value)
    assert len(str(caught.value)) < 150


def test_whole_numbers_stand_with_commas_between():
    assert whole_numbers("4,6") == whole_numbers("[4, 6]") == [4, 6]
    with pytest.raises(ArgumentTypeError, match="such as 4,6; got 'four'"):
        whole_numbers("four")
