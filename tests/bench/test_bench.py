"""The benchmarks at toy size: what they print, and that the naive loop is the Llama of the model it stands for."""

import json
import math
import time

import pytest
import torch

from duollm import bench
from duollm.bench import search, training
from duollm.bench.training import GPT
from duollm.models.branch import Branch
from duollm.models.configuration_duo import DuoConfig
from tiny import SIZES, tiny_model


def no_compiler(module, **options):
    """torch.compile where there is no compiler: it fails at the first call."""

    def call(*arguments, **keywords):
        raise RuntimeError("no C++ compiler found\nand so on")

    return call


@pytest.fixture
def toy(monkeypatch):
    """Toy sizes, and no time spent on measuring the machine."""
    for module in (search, training):
        monkeypatch.setattr(module, "DuoConfig", lambda **sizes: DuoConfig(**{**SIZES, "vocab_size": 4096, **sizes}))
    monkeypatch.setattr(search, "matmul_peak", lambda precision: 1e12)
    monkeypatch.setattr(training, "best_matmul", lambda precision: (1e12, (2, 3, 4)))
    monkeypatch.setattr(training, "faster_precision", lambda: "fp32")
    monkeypatch.setattr(training, "LOADS", dict.fromkeys(training.LOADS, training.Load((16,), 2, 9, eager=True)))
    monkeypatch.setattr(torch, "compile", no_compiler)
    sizes = {
        "_LENGTH": 9,
        "LOADS": dict.fromkeys(search.LOADS, search.Load((16,), 2, 9)),
        "_NAIVE_ROUTES": 2,
        "_BUDGET": 1,
        "_LAYERS": 3,
        "_DEPTHS": (2, 3),
        "_BEAM_DEPTHS": (3, 6),
    }
    for name, value in sizes.items():
        monkeypatch.setattr(search, name, value)


def rows_of(capsys, which):
    bench.run_bench(which, 0.01, as_json=True)
    return json.loads(capsys.readouterr().out)["rows"]


def test_training_is_compared_with_dense_models_and_says_what_it_skips(toy, capsys):
    *rows, peak, llama, gpt, eager_gpt, duo = rows_of(capsys, "train")
    assert [row["model"] for row in rows] == [
        "Llama",
        "Llama, eager attention",
        "GPT by hand",
        "GPT by hand, eager attention",
        "duo",
    ]
    assert rows[0]["ratio to Llama"] == 1
    assert rows[-1]["ratio to Llama"] == pytest.approx(rows[-1]["tokens/s"] / rows[0]["tokens/s"])
    assert rows[-1]["share of matmul peak"] == pytest.approx(rows[-1]["GFLOP/s"] / 1000)
    assert (peak["model"], peak["GFLOP/s"]) == ("matmul peak (fp32, 2 x 3 x 4)", 1000)
    assert {row["skipped"] for row in (llama, gpt, eager_gpt, duo)} == {"no C++ compiler found"}
    assert duo["model"] == "duo, compiled"


def test_compiled_models_are_measured_against_compiled_llama(toy, capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    by_name = {row["model"]: row for row in rows_of(capsys, "train")}
    duo, llama = by_name["duo, compiled"], by_name["Llama, compiled"]
    assert duo["ratio to Llama, compiled"] == pytest.approx(duo["tokens/s"] / llama["tokens/s"])


@pytest.mark.parametrize("fused", [True, False])
def test_the_gpt_by_hand_is_causal_and_starts_at_chance(fused):
    torch.manual_seed(0)
    model = GPT(vocab=31, width=16, layers=2, heads=2, inner=24, length=9, fused=fused)
    ids = torch.randint(31, (2, 9))
    assert model(ids).item() == pytest.approx(math.log(31), abs=0.1)
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 1) % 31
    seen = []
    model.norm.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    model(ids), model(changed)
    torch.testing.assert_close(seen[0], seen[1])


def test_searches_are_compared_with_the_naive_loop_and_over_depth(toy, capsys):
    rows = rows_of(capsys, "oracle")
    assert [row["search"] for row in rows[:4]] == ["naive", "shared", "reference", "committed, 1 big"]
    assert rows[1]["ratio to naive"] == pytest.approx(rows[1]["tokens/s"] / rows[0]["tokens/s"])
    assert [(row["search"], row["L"]) for row in rows[4:]] == [
        ("shared", 2),
        ("shared", 3),
        ("beam, reference", 3),
        ("beam, reference", 6),
    ]


def test_a_table_is_printed_without_json(toy, capsys):
    bench.run_bench("train", 0.01)
    shown = capsys.readouterr().out
    assert "ratio to Llama" in shown
    assert "matmul peak" in shown


def test_a_row_is_printed_before_the_next_is_measured(toy, capsys, monkeypatch):
    def stop(layers, seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(search, "_beam_of_depth", stop)
    with pytest.raises(KeyboardInterrupt):
        bench.run_bench("oracle", 0.01)
    title, *lines = capsys.readouterr().out.splitlines()
    assert title == "duollm bench oracle"
    searches = [line.split()[0] for line in lines if line]
    assert searches[:5] == ["search", "naive", "shared", "reference", "committed,"]
    assert searches[-2:] == ["shared", "shared"]  # of two depths; the third was stopped


def test_runs_take_turns_and_the_first_round_is_not_counted():
    order = []

    def slow_at_first():
        order.append("a")
        time.sleep(0.2 if len(order) == 1 else 0.01)

    times = bench.mean_seconds({"a": slow_at_first, "b": lambda: order.append("b")}, seconds=0.02)
    assert order[:4] == ["a", "b", "a", "b"]
    assert times["a"] == pytest.approx(0.01, abs=0.05)
    assert times["b"] < times["a"]


def test_the_naive_loop_is_the_same_model():
    model, ids = tiny_model(), torch.randint(31, (2, 9))
    llama, ffns = search.as_llama(model)
    route = [Branch.SMALL, Branch.BIG, Branch.SMALL]
    for layer, choices, branch in zip(llama.model.layers, ffns, route, strict=True):
        layer.mlp = choices[branch]
    with torch.no_grad():
        expected = model(input_ids=ids, routes=torch.tensor(route)).logits
        torch.testing.assert_close(llama(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)
