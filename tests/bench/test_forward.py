"""Predictions of `bench forward` against naive counts, and the whole of it at toy size."""

import json

import pytest
import torch

from duollm import bench
from duollm.bench import forward
from duollm.flops import ffn_parameters
from duollm.models.branch import Branch
from tiny import SIZES, random_routes, tiny_model

SMALL, BIG = int(Branch.SMALL), int(Branch.BIG)


def test_a_prediction_lies_on_the_line_through_the_ends():
    assert forward.predict(0.25, (0, 2.0), (1, 6.0)) == pytest.approx(3.0)
    assert forward.predict(30, (10, 1.0), (50, 5.0)) == pytest.approx(3.0)


def test_flops_are_those_of_each_tokens_branch():
    config, routes_BTL = tiny_model().config, random_routes()
    sizes = {Branch.SKIP: 0, Branch.SMALL: config.small_intermediate_size, Branch.BIG: config.intermediate_size}
    expected = sum(2 * 3 * config.hidden_size * sizes[Branch(branch)] for branch in routes_BTL.flatten().tolist())
    assert forward.ffn_flops(config, routes_BTL) == expected


def test_a_step_reads_a_branch_once_however_many_sequences_take_it():
    config = tiny_model().config
    _, small, big = ffn_parameters(config)
    one_step = torch.tensor([[[SMALL, BIG, BIG]], [[SMALL, SMALL, BIG]]])  # layers: small; both; big
    assert forward.weights_read(config, one_step) == 2 * small + 2 * big
    all_small = torch.full_like(one_step, SMALL)
    two_steps = torch.cat([one_step, all_small], dim=1)
    assert forward.weights_read(config, two_steps) == (2 * small + 2 * big + 3 * small) / 2


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_shares_are_exact_at_each_layer_of_a_prompt_and_for_each_token_of_a_step(share):
    generator = torch.Generator().manual_seed(0)
    prompt, step = (forward.draw_routes(shape, share, generator) for shape in ((2, 16, 4), (3, 2, 4)))
    assert ((prompt == BIG).float().mean((0, 1)) == share).all()
    assert ((step == BIG).float().mean(-1) == share).all()
    assert set(prompt.unique().tolist()) <= {SMALL, BIG}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_share_is_compared_with_llama_and_the_prediction(monkeypatch, capsys, precision):
    sizes = {"_SIZES": SIZES, "_ROUTER_SIZES": SIZES, "_PREFILL": 9, "_PROMPT": 5, "_STEPS": 2, "_BATCHES": (1, 2)}
    for name, value in sizes.items():
        monkeypatch.setattr(forward, name, value)
    bench.run_bench("forward", 0.001, precision, as_json=True)
    rows = json.loads(capsys.readouterr().out)["rows"]
    works = [(phase, batch) for phase in ("prefill", "decode") for batch in (1, 2)]
    models = ["0% big", "25% big", "50% big", "75% big", "100% big", "transformers Llama"]
    assert [(row["phase"], row["batch"], row["model"]) for row in rows[:24]] == [
        (*work, model) for work in works for model in models
    ]
    assert [(row["phase"], row["batch"], row["model"].split(" ")[0]) for row in rows[24:]] == [
        (*work, kind) for kind in ("linear", "sequential") for work in works
    ]
    for start in range(0, 24, 6):
        *shares, dense = rows[start : start + 6]
        assert [shares[end]["ratio to predicted"] for end in (0, -1)] == pytest.approx([1, 1])
        assert shares[1]["ratio to predicted"] == pytest.approx(shares[1]["ms"] / shares[1]["predicted ms"])
        assert shares[1]["speed vs all big"] == pytest.approx(shares[-1]["ms"] / shares[1]["ms"])
        assert shares[-1]["speed vs Llama"] == pytest.approx(dense["ms"] / shares[-1]["ms"])
    assert all(row["router's share of time"] < 1 for row in rows[24:])


def test_decoding_in_graphs_takes_every_pattern_and_llama():
    model = tiny_model(attention="sdpa")
    llama, _ = forward.as_llama(model)
    rows = forward._in_graphs(model, llama, 2, 0.001, backend="eager", fullgraph=True)
    assert [row["model"] for row in rows] == [
        "transformers Llama",
        "0% big",
        "25% big",
        "50% big",
        "75% big",
        "100% big",
    ]
    assert rows[1]["speed vs Llama"] == pytest.approx(rows[0]["ms"] / rows[1]["ms"])
    assert rows[-1]["speed vs all big"] == 1
