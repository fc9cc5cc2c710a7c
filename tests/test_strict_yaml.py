import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from duollm import strict_yaml
from duollm.errors import UserError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("100", 100),
        ("0", 0),
        ("-2_000", -2000),
        ("3e-4", 3e-4),
        (".5", 0.5),
        ("true", True),
        ("~", None),
        ("{a: , b: no}", {"a": None, "b": "no"}),
        ("[0100, 0x10, 0b1, 1:30, 2024-01-01, yes, off, nan, =]",
         ["0100", "0x10", "0b1", "1:30", "2024-01-01", "yes", "off", "nan", "="]),
        ("{<<: {a: 1, b: 2}, a: 3}", {"a": 3, "b": 2}),
        ("{a: &k [1, 2], b: *k}", {"a": [1, 2], "b": [1, 2]}),
    ],
)  # fmt: skip
def test_plain_values_are_read_as_they_are_written(text, value):
    assert strict_yaml.load(text) == value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: 2\na: 3\n", "'a' is given twice, in lines 1 and 3"),
        ("b:\n  a: 1\n  'a': 3\n", "'a' is given twice, in lines 2 and 3"),
        ("{a: 1, a: 1}", "'a' is given twice, in line 1"),
        ("[{a: {b: 1, b: 2}}]", "'b' is given twice"),
        ("[" * 3000 + "]" * 3000, "nested too deeply"),
        ("\n".join(" " * depth + "a:" for depth in range(3000)), "nested too deeply"),
        ("9" * 5000, "not readable as YAML"),
        ("a: 1\n---\nb: 2\n", "single document"),
        ("? [a]\n: 1", "unhashable"),
        ('"\\0"', "no file can be named"),
        ('"\\ud800"', "no file can be named"),
    ],
    ids=lambda text: text[:10],
)
def test_what_would_be_lost_or_cannot_be_read_is_refused_in_one_line(text, expected):
    with pytest.raises(UserError) as caught:
        strict_yaml.load(text)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["5 # five", "[1, 2] # both", "a\n...", "# nothing"])
def test_on_the_command_line_nothing_is_a_comment(text):
    with pytest.raises(UserError, match="follows the value"):
        strict_yaml.load_argument(text)


@pytest.mark.parametrize("text", ["1_", "1__0", "_1", "1_.5"])
def test_underscores_stand_between_digits(text):
    assert strict_yaml.load(text) == text


@given(
    st.dictionaries(st.text("aeon0123456789.:_-+xb yE#'\"[]"), st.text("aeon0123456789.:_-+xb yE#'\"[]") | st.floats())
)
def test_what_is_written_reads_back_the_same_with_either_version(values):
    text = strict_yaml.dump(values)
    for back in (strict_yaml.load(text), yaml.safe_load(text)):
        assert repr(back) == repr(values)
