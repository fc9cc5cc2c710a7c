"""Small FFNs cut out of the big ones and distilled from them."""

import re

import pytest
import torch

from duollm.convert.small_ffn import (
    Examples,
    fit_linear,
    initialise_small_ffns,
    make_linear,
    sample_ffns,
)
from duollm.flops import count_parameters, ffn_parameters
from duollm.models.ffn import DuoFFN
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.models.policy import FixedRoutes
from tiny import random_ids, tiny_config, tiny_model

KINDS = {
    "gated": {},
    "gated-bias": {"mlp_bias": True},
    "plain-bias": {"gated_ffn": False, "mlp_bias": True, "hidden_act": "relu", "norm": "layer", "positions": "learned"},
    "skips-layers": {"skip_scope": "layer"},
}
kinds = pytest.mark.parametrize("kind", KINDS)
SAMPLE_WT = random_ids(batch=40, tokens=24)
STEPS = 60


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch):
    monkeypatch.setattr("duollm.convert.small_ffn.faster_precision", lambda: "fp32")


def biased_model(kind, **sizes):
    """A tiny duo whose biases are not zero."""
    model = tiny_model(**KINDS[kind], **sizes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.bias"):
                parameter.uniform_(-0.5, 0.5)
    return model


def errors_by_layer(model, ids):
    """The naive truth: relative squared errors of the small FFNs on all-big states, weighted by the stream's size."""
    seen = []

    def note(layer, given, returned):
        seen[-1][1] = returned[0].square().mean(-1)

    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda mlp, given: seen.append([given[0], None]))
        layer.register_forward_hook(note)
    with torch.no_grad():
        model(ids)
        for layer, (states, size) in zip(model.model.layers, seen, strict=True):
            big, small, weights = layer.mlp.big(states), layer.mlp.small(states), 1 / size[..., None]
            mean = (weights * big).sum((0, 1)) / weights.sum()
            yield ((weights * (big - small) ** 2).sum() / (weights * (big - mean) ** 2).sum()).item()


@kinds
def test_distilled_is_better_than_slice_and_slice_than_random(kind):
    errors = {}
    for how in ("random", "slice", "distilled"):
        model = biased_model(kind)
        initialise_small_ffns(model, how, SAMPLE_WT, steps=STEPS)
        errors[how] = list(errors_by_layer(model, random_ids(batch=40, tokens=24, seed=3)))
    for random, cut, distilled in zip(*errors.values(), strict=True):
        assert distilled < cut < random


@kinds
def test_the_explained_variance_is_that_of_windows_left_out(kind):
    model = biased_model(kind)
    explained = initialise_small_ffns(model, "slice", SAMPLE_WT)
    expected = [1 - error for error in errors_by_layer(model, SAMPLE_WT[-5:])]
    assert explained == pytest.approx(expected, abs=0.02)  # states are kept in bfloat16


@kinds
def test_a_slice_as_wide_as_the_whole_is_the_whole(kind):
    model = biased_model(kind, small_intermediate_size=24)
    assert min(initialise_small_ffns(model, "slice", SAMPLE_WT)) > 0.999


def test_a_slice_takes_the_neurons_that_add_most():
    model = biased_model("gated")
    big = model.model.layers[0].mlp.big
    loud = torch.tensor([2, 3, 5, 11, 17, 23])
    with torch.no_grad():
        big.down_proj.weight[:, loud] *= 100
    initialise_small_ffns(model, "slice", SAMPLE_WT)
    small = model.model.layers[0].mlp.small
    assert torch.equal(small.up_proj.weight, big.up_proj.weight[loud])
    assert torch.equal(small.gate_proj.weight, big.gate_proj.weight[loud])
    torch.testing.assert_close(small.down_proj.weight, big.down_proj.weight[:, loud], rtol=0.05, atol=1.5)


def test_only_the_small_ffns_change():
    model, before = tiny_model(), tiny_model().state_dict()
    initialise_small_ffns(model, "distilled", SAMPLE_WT, steps=STEPS)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if ".mlp.small." in name}
    assert model(SAMPLE_WT[:1], routes=[1, 1, 1]).logits.isfinite().all()


def test_it_is_the_same_for_the_same_seed_and_only_then():
    def weights(seed):
        model = tiny_model()
        initialise_small_ffns(model, "distilled", SAMPLE_WT, seed=seed, steps=STEPS)
        return model.model.layers[1].mlp.small.up_proj.weight

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_weights_keep_their_type():
    model = tiny_model().to(torch.bfloat16)
    explained = initialise_small_ffns(model, "slice", SAMPLE_WT)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert explained == pytest.approx(initialise_small_ffns(tiny_model(), "slice", SAMPLE_WT), abs=0.05)


def test_every_layer_is_reported_with_the_time_left():
    said = []
    initialise_small_ffns(tiny_model(), "slice", SAMPLE_WT, progress=said.append)
    assert re.fullmatch(r"small FFN of layer 3/3: explains -?\d+% of .*  ETA 0:00", said[-1])
    assert len(said) == 4


def test_samples_are_the_same_for_any_number_of_windows_at_a_time(monkeypatch):
    model = tiny_model()
    with sample_ffns(model, SAMPLE_WT, "fp32") as whole:
        monkeypatch.setattr("duollm.convert.small_ffn._BATCH_TOKENS", 50)
        with sample_ffns(model, SAMPLE_WT, "fp32") as in_parts:
            torch.testing.assert_close(in_parts[0], whole[0], rtol=0.01, atol=0.01)
            torch.testing.assert_close(in_parts[1], whole[1])


def test_a_perfect_copy_explains_everything():
    model = tiny_model(small_intermediate_size=24)
    big = model.model.layers[0].mlp.big
    states_ND = torch.randn(50, 16)
    examples = Examples(states_ND, big(states_ND).detach(), torch.ones(50))
    assert examples.explained_by(big) == pytest.approx(1)


def rows(seed=0, noise=0.0, rank=16):
    """Inputs that are not centred, outputs of a map of some rank with a bias, and uneven weights."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    states_ND, left_DR, right_RD = draw(500, 16) + 0.7, draw(16, rank), draw(rank, 16)
    outputs_ND = states_ND @ left_DR @ right_RD / rank + draw(16) + noise * draw(500, 16)
    return states_ND, outputs_ND, draw(500).exp()


def fitted(rank, *given):
    small = DuoFFN(tiny_config(), rank, linear=True)
    fit_linear(small, Examples(*given))
    return small


def error(predicted_ND, outputs_ND, weights_N):
    return (weights_N * (predicted_ND - outputs_ND).square().sum(-1)).sum().item()


def test_a_map_of_its_rank_is_found(monkeypatch):
    monkeypatch.setattr("duollm.convert.small_ffn._RIDGE", 1e-9)
    states_ND, outputs_ND, weights_N = rows(rank=3)
    small = fitted(3, states_ND, outputs_ND, weights_N)
    torch.testing.assert_close(small(states_ND), outputs_ND, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_of_all_maps_of_its_rank_it_is_the_best(monkeypatch, rank):
    """The naive truth: the singular values of the whitened regression that are cut off are the error."""
    monkeypatch.setattr("duollm.convert.small_ffn._RIDGE", 1e-9)
    states_ND, outputs_ND, weights_N = rows(noise=1.0)
    small = fitted(rank, states_ND, outputs_ND, weights_N)
    root_N1 = weights_N.double().sqrt()[:, None]
    ones_NF = torch.cat([states_ND, torch.ones(500, 1)], dim=1).double() * root_N1
    full_ND = ones_NF @ torch.linalg.lstsq(ones_NF, outputs_ND.double() * root_N1).solution
    mean_ND = root_N1 @ (weights_N.double() @ (full_ND / root_N1) / weights_N.sum())[None]
    cut_R = torch.linalg.svdvals(full_ND - mean_ND)[rank:]
    least = (outputs_ND.double() * root_N1 - full_ND).square().sum() + cut_R.square().sum()
    assert error(small(states_ND), outputs_ND, weights_N) == pytest.approx(least.item(), rel=1e-4)


@pytest.mark.parametrize("sizes", [{}, {"gated_ffn": False, "mlp_bias": True, "hidden_act": "relu"}], ids=str)
def test_a_converted_model_is_counted_saved_and_loaded(sizes, tmp_path):
    model, ids = tiny_model(**sizes), random_ids()
    all_big = model(ids).logits
    told = initialise_small_ffns(model, "linear", SAMPLE_WT)
    assert torch.equal(model(ids).logits, all_big)
    assert min(told) > 0, "better than the mean output, on windows that it was not fitted to"
    parts = count_parameters(model.config)
    assert parts.total == sum(weight.numel() for weight in model.parameters())
    small = model.model.layers[0].mlp.small
    assert ffn_parameters(model.config).small == small.up_proj.weight.numel() + small.down_proj.weight.numel()
    model.save_pretrained(tmp_path)
    loaded = DuoForCausalLM.from_pretrained(tmp_path).eval()
    weights = model.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in loaded.state_dict().items())
    for routes in ([1, 1, 1], [2, 1, 0]):  # closely: products round by how the weights lie in memory
        torch.testing.assert_close(loaded(ids, routes=routes).logits, model(ids, routes=routes).logits)
    reference = model(ids, routes=[1, 2, 1], execution="reference").logits
    torch.testing.assert_close(model(ids, routes=[1, 2, 1]).logits, reference, atol=1e-5, rtol=1e-4)


def test_the_mean_output_is_a_map_of_rank_one_that_ignores_its_input(tmp_path):
    model, ids = tiny_model(), random_ids()
    all_big = model(ids).logits
    skipped, half = (error_at(model, routes) for routes in ([0, 0, 0], [0, 2, 0]))
    told = initialise_small_ffns(model, "mean", SAMPLE_WT)
    assert torch.equal(model(ids).logits, all_big)
    assert max(map(abs, told)) < 0.1, "the mean of other windows explains nothing, and costs little"
    assert model.config.small_intermediate_size == 1
    parts = count_parameters(model.config)
    assert parts.total == sum(weight.numel() for weight in model.parameters())
    states_ND = torch.randn(5, 16)
    for layer in model.model.layers:
        assert (layer.mlp.small(states_ND) == layer.mlp.small.down_proj.bias).all()
    assert error_at(model, [1, 1, 1]) < skipped
    assert error_at(model, [1, 2, 1]) < half
    model.save_pretrained(tmp_path)
    loaded = DuoForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(ids, routes=[1, 2, 1]).logits, model(ids, routes=[1, 2, 1]).logits)


def error_at(model, routes):
    """Mean squared distance of the final states from those of all big."""
    whole, cheaper = (
        model.model(SAMPLE_WT, policy=FixedRoutes(torch.tensor(each))).last_hidden_state for each in ([2, 2, 2], routes)
    )
    return (whole - cheaper).square().mean().item()


def test_only_all_big_can_be_made_dense():
    model, ids = tiny_model(), random_ids()
    make_linear(model)
    torch.testing.assert_close(model.to_dense("big")(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match="cannot have small_linear=True"):
        model.to_dense("small")


def test_a_rank_above_the_width_is_refused():
    model = tiny_model(small_intermediate_size=17, intermediate_size=32)
    with pytest.raises(ValueError, match=r"small_intermediate_size \(17\) is the rank .* hidden_size \(16\)"):
        make_linear(model)
