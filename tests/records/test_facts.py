import json

import pytest

from duollm.errors import UserError
from duollm.records.facts import list_domains, read_timing
from duollm.records.keys import Key

ROWS = [
    {"policy": "linear_k2", "big_layers": 2, "relative_time": 0.6},
    {"policy": "pattern", "big_layers": 2, "relative_time": 0.5},
    {"policy": "routes", "big_layers": 2, "relative_time": 0.7},
    {"policy": "all-small", "big_layers": 0, "relative_time": 0.4},
]


@pytest.fixture
def timing(tmp_path):
    (tmp_path / "evaluate").mkdir()
    facts = {"all_small_flops_per_token": 100.0, "all_big_flops_per_token": 300.0, "policies": ROWS}
    (tmp_path / "evaluate" / "timing.json").write_text(json.dumps(facts))
    return read_timing(tmp_path)


@pytest.mark.parametrize(
    ("policy", "big_layers", "kind", "expected"),
    [
        ("linear_k2", 2, "linear", 0.6),
        ("static", 2, None, 0.5),
        ("best-of-100-patterns", 2, None, 0.5),
        ("oracle", 2, None, 0.7),
        ("all-small", 0, None, 0.4),
        ("all-big", 6, None, 1.0),
        ("gains_k2", 2, "gains", None),
        ("static", 3, None, None),
    ],
)
def test_a_policy_takes_as_long_as_what_executes_alike(timing, policy, big_layers, kind, expected):
    assert timing.row(Key(policy, big_layers, kind)).get("relative_time") == expected


def test_flops_lie_between_both_ends(timing):
    assert [timing.flops_per_token(share) for share in (0, 0.25, 1)] == [100, 150, 300]


def test_a_run_without_evaluation_has_no_times(tmp_path):
    assert read_timing(tmp_path) is None


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"policies": [{"policy": "linear_k2"}]}'])
def test_a_damaged_file_is_refused_with_what_to_delete(tmp_path, content):
    (tmp_path / "evaluate").mkdir()
    (tmp_path / "evaluate" / "timing.json").write_text(content)
    with pytest.raises(UserError, match=r"timing\.json: not a file of times .*; delete the folder .*evaluate and run"):
        read_timing(tmp_path)


def test_domains_come_in_the_order_of_the_recipe(own_run):
    assert list_domains(own_run) == ["code", "prose"]
    (own_run / "data").mkdir()
    sources = [{"domain": domain, "origin": "..."} for domain in ("prose", "unsearched", "code")]
    (own_run / "data" / "manifest.json").write_text(json.dumps({"sources": sources}))
    assert list_domains(own_run) == ["prose", "code"]


def test_no_oracle_results(tmp_path):
    with pytest.raises(UserError, match="run `duollm oracle` first"):
        list_domains(tmp_path)
