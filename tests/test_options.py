from argparse import ArgumentTypeError

import pytest

from duollm.errors import UserError
from duollm.options import Parser, listed, number, rows, whole_number


def test_values_in_range_are_read():
    assert whole_number(0, 7)("7") == 7
    assert number(0.5, 2)("1.5") == 1.5
    assert listed(str)(" prose, ./my code ") == ["prose", "./my code"]
    assert listed(str)("[a],b") == ["[a]", "b"]
    assert listed(whole_number(), brackets=True)("[4, 6]") == [4, 6]
    assert (rows("auto"), rows("3")) == ("auto", 3)
    with pytest.raises(ArgumentTypeError, match="takes a whole number or auto, got 'auto:4'"):
        rows("auto:4")


@pytest.mark.parametrize(
    ("read", "text", "expected"),
    [
        (whole_number(), "0", "from 1 to 1,000,000,000, got '0'"),
        (whole_number(), "many", "from 1 to 1,000,000,000, got 'many'"),
        (whole_number(), "1.5", "from 1 to 1,000,000,000, got '1.5'"),
        (whole_number(), "99999999999999999999", "to 1,000,000,000, got"),
        (whole_number(), "9" * 5000, "takes a whole number"),
        (number(0.5, 2), "nan", "from 0.5 to 2, got 'nan'"),
        (number(0.5, 2), "inf", "from 0.5 to 2"),
        (number(0.5, 2), "x", "from 0.5 to 2"),
        (listed(str), "prose,", "'prose,' holds an empty value"),
        (listed(str), "", "holds an empty value"),
        (listed(number(0, 1)), "0;1", "from 0 to 1, got '0;1'"),
        (listed(str), "a, ,b", "holds an empty value"),
        (listed(str), "a,b, a", "holds 'a' twice"),
    ],
)
def test_other_values_are_refused_with_what_is_allowed(read, text, expected):
    with pytest.raises(ArgumentTypeError) as caught:
        read(text)
    assert expected in str(caught.value)
    assert len(str(caught.value)) < 150


@pytest.mark.parametrize("given", [["--tokens", "5", "--tokens", "6"], ["--tokens=5", "--list", "a", "--tokens", "5"]])
def test_an_option_given_twice_is_refused(given):
    parser = Parser()
    parser.add_argument("--tokens")
    parser.add_argument("--list", action="append")
    parser.add_argument("text", nargs="?")
    with pytest.raises(UserError, match="--tokens is given 2 times; keep one of them"):
        parser.parse(given)
    parser.parse(["--list", "a", "--list", "b", "--tokens", "5", "--", "--tokens"])


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ("max_new_tokens 31: no room", "--max-new-tokens 31: no room"),
        ("sequence_length must be 2", "data.sequence_length must be 2"),
        ("documents must be 2", "documents must be 2"),
        ("model must be a folder", "model must be a folder"),
        ("nothing of the kind", "nothing of the kind"),
        ("data.tokens must be 2", "data.tokens must be 2"),
    ],
)
def test_the_option_is_named_in_place_of_the_librarys_argument(message, named):
    parser = Parser()
    parser.add_argument("model")
    for option in ("max-new-tokens", "data.sequence_length", "data.tokens", "oracle.documents", "evaluate.documents"):
        parser.add_argument(f"--{option}")
    assert parser.name_option(message) == named
