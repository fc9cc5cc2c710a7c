import json

import pytest
import torch

from duollm.measure.timing import Timer, Workload, durations, fixed_workloads
from duollm.models.branch import Branch
from duollm.routers.linear import LinearRouter
from tiny import random_ids, tiny_model


class _Clock:
    """A clock that tells how long each run takes; runs take turns."""

    def __init__(self):
        self.now, self.order = 0.0, []

    def run(self, name, seconds):
        def work():
            self.order.append(name)
            self.now += seconds

        return work


@pytest.fixture
def clock(monkeypatch):
    clock = _Clock()
    monkeypatch.setattr("duollm.measure.timing.time.perf_counter", lambda: clock.now)
    return clock


def test_runs_take_turns_and_the_first_round_is_not_counted(clock):
    spent = durations({"a": clock.run("a", 1.0), "b": clock.run("b", 2.0)}, rounds=3)
    assert spent == {"a": [1.0] * 3, "b": [2.0] * 3}
    assert clock.order == ["a", "b"] * 4


def test_rounds_go_on_until_the_time_is_up(clock):
    assert len(durations({"a": clock.run("a", 1.0), "b": clock.run("b", 3.0)}, seconds=9.0)["a"]) == 5


def test_fixed_workloads_spend_their_budget():
    all_small, *others = fixed_workloads(tiny_model(), [1, 2], (8, 9), Branch.SMALL)
    assert (all_small.routes == Branch.SMALL).all()
    assert [one.facts["policy"] for one in others] == ["pattern", "routes"] * 2
    for one in others:
        assert ((one.routes == Branch.BIG).sum(-1) == one.facts["big_layers"]).all()
    assert others[1].routes.shape == (8, 9, 3)
    assert len(others[1].routes.flatten(0, 1).unique(dim=0)) == 3


@pytest.mark.parametrize(("seconds", "sequences"), [(0.1, 8), (0.5, 4), (60.0, 1)])
def test_a_slow_model_is_timed_on_fewer_sequences(clock, monkeypatch, seconds, sequences):
    model, ids = tiny_model(), random_ids(batch=10)
    monkeypatch.setattr(Timer, "_forward", lambda *_, **__: clock.run("all big", seconds))
    assert torch.equal(Timer(model, ids).token_ids_BT, ids[:sequences])


def test_a_router_is_timed_beside_all_big_and_its_own_routes(tmp_path, monkeypatch):
    model = tiny_model()
    router = LinearRouter(model.config, (Branch.SMALL, Branch.BIG)).eval()
    torch.nn.init.normal_(router.weight_LCD)
    timer = Timer(model, random_ids(batch=3), rounds=2)
    times = {"all big": [4.0, 6.0], "policy": [2.0, 6.0], "routes given": [1.0, 4.5]}
    seen = []

    def fake(runs, rounds):
        seen.append({name: run() for name, run in runs.items()})
        return {name: times[name] for name in runs}

    monkeypatch.setattr("duollm.measure.timing.durations", fake)
    timer.measure(Workload({"policy": "linear_k1", "big_layers": 1}, router))
    timer.measure(Workload({"policy": "all-small", "big_layers": 0}, routes=torch.ones(3, dtype=torch.long)))
    timer.write(tmp_path / "timing.json")
    written = json.loads((tmp_path / "timing.json").read_text())
    assert seen[0]["routes given"] == pytest.approx(seen[0]["policy"])
    assert seen[0]["all big"] != pytest.approx(seen[0]["policy"])
    assert list(seen[1]) == ["all big", "policy"]
    first, second = written["policies"]
    assert (first["relative_time"], first["router_time_share"]) == (0.75, 0.375)
    assert "router_time_share" not in second
    assert written["all_big_seconds_per_token"] == 5 / 27
    assert 0 < written["all_small_flops_per_token"] < written["all_big_flops_per_token"]
    assert (written["sequences"], written["sequence_length"], written["rounds"]) == (3, 9, 2)
