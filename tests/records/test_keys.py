import pytest

from duollm.records.keys import Key, ceiling_policy, predictor_policy


@pytest.mark.parametrize(
    ("key", "variant"),
    [
        (Key("static", 3), "static"),
        (Key("gains_k3", 3, "gains", "average"), "gains"),
        (Key("gains_k3_exact", 3, "gains", "exact"), "gains, exact"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.policy,
)
def test_a_variant_is_what_a_key_is_one_budget_of(key, variant):
    assert key.variant == variant


def test_the_control_of_the_ceiling_is_the_shuffled_predictor():
    assert predictor_policy("shuffled", "exact") == ceiling_policy("exact", shuffled=True) == "ceiling-shuffled-exact"
    assert (ceiling_policy("average"), predictor_policy("l5", "average")) == ("ceiling", "predictor-l5")


def test_what_only_serves_other_quantities_stands_in_no_table():
    assert Key(predictor_policy("l5", "exact"), 2).auxiliary
    assert Key("drawn-oracle", 2, context="shared").auxiliary
    assert not Key("ceiling-shuffled", 2).auxiliary
