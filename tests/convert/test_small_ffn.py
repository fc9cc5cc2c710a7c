"""Small FFNs cut out of the big ones and distilled from them."""

import re

import pytest
import torch

from duollm.convert.small_ffn import Examples, explained_variance, initialise_small_ffns, sample_ffns
from tiny import random_ids, tiny_model

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


@pytest.mark.parametrize(("windows", "inner"), [(1, 6), (4, 25)], ids=["one-window", "wider-than-big"])
def test_what_cannot_be_fitted_is_refused(windows, inner):
    with pytest.raises(ValueError, match=r"two windows .* \(got .* and 24\)"):
        initialise_small_ffns(tiny_model(small_intermediate_size=inner), "slice", SAMPLE_WT[:windows])


def test_a_perfect_copy_explains_everything():
    model = tiny_model(small_intermediate_size=24)
    big = model.model.layers[0].mlp.big
    states_ND = torch.randn(50, 16)
    examples = Examples(states_ND, big(states_ND).detach(), torch.ones(50))
    assert explained_variance(big, examples) == pytest.approx(1)
