import pytest

from duollm.errors import UserError, did_you_mean


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("token", "did you mean 'tokens'? allowed: compile, tokens"),
        ("complie", "did you mean 'compile'? allowed: compile, tokens"),
        ("zzz", "allowed: compile, tokens"),
    ],
)
def test_the_nearest_name_leads_the_allowed_ones(given, expected):
    assert did_you_mean(given, ["tokens", "compile"]) == expected


def test_user_errors_are_value_errors_for_callers_in_python():
    assert issubclass(UserError, ValueError)
