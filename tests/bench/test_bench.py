"""The benchmarks at toy size: what they print, and that the naive loop is the Llama of the model it stands for."""

import json

import pytest
import torch

from duollm import bench
from duollm.bench import search, training
from duollm.models.branch import Branch
from duollm.models.configuration_duo import DuoConfig
from tiny import SIZES, tiny_model


@pytest.fixture
def toy(monkeypatch):
    """Toy sizes, and no time spent on measuring the machine."""
    for module in (search, training):
        monkeypatch.setattr(module, "DuoConfig", lambda **sizes: DuoConfig(**{**SIZES, "vocab_size": 4096, **sizes}))
        monkeypatch.setattr(module, "matmul_peak", lambda precision: 1e12)
    monkeypatch.setattr(training, "faster_precision", lambda: "fp32")
    monkeypatch.setattr(training.shutil, "which", lambda name: None)
    monkeypatch.setattr(training, "_BATCH", 2)
    sizes = {
        "_LENGTH": 9,
        "_BATCH": 2,
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


def test_training_is_compared_with_llama(toy, capsys):
    rows = rows_of(capsys, "train")
    assert [row["model"] for row in rows] == ["transformers Llama", "duo"]
    assert rows[0]["ratio to Llama"] == 1
    assert rows[1]["ratio to Llama"] == pytest.approx(rows[1]["tokens/s"] / rows[0]["tokens/s"])


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
    assert "transformers Llama" in shown


def test_the_naive_loop_is_the_same_model():
    model, ids = tiny_model(), torch.randint(31, (2, 9))
    llama, ffns = search.as_llama(model)
    route = [Branch.SMALL, Branch.BIG, Branch.SMALL]
    for layer, choices, branch in zip(llama.model.layers, ffns, route, strict=True):
        layer.mlp = choices[branch]
    with torch.no_grad():
        expected = model(input_ids=ids, routes=torch.tensor(route)).logits
        torch.testing.assert_close(llama(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)
