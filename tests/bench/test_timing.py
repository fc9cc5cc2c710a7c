import time

import pytest

from duollm.bench.timing import alternate


def test_runs_take_turns_and_the_first_round_is_not_counted():
    order = []

    def slow_at_first():
        order.append("a")
        time.sleep(0.2 if len(order) == 1 else 0.01)

    times = alternate({"a": slow_at_first, "b": lambda: order.append("b")}, seconds=0.02)
    assert order[:4] == ["a", "b", "a", "b"]
    assert times["a"] == pytest.approx(0.01, abs=0.05)
    assert times["b"] < times["a"]
