import pytest
import torch

from duollm.convert.linear_small import fit_linear, make_linear
from duollm.convert.small_ffn import initialise_small_ffns
from duollm.flops import count_parameters, ffn_parameters
from duollm.models.modeling_duo import DuoFFN, DuoForCausalLM
from tiny import random_ids, tiny_config, tiny_model

SAMPLE_WT = random_ids(batch=40, tokens=24)


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch):
    monkeypatch.setattr("duollm.convert.small_ffn.faster_precision", lambda: "fp32")


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
    fit_linear(small, *given)
    return small


def error(predicted_ND, outputs_ND, weights_N):
    return (weights_N * (predicted_ND - outputs_ND).square().sum(-1)).sum().item()


def test_a_map_of_its_rank_is_found(monkeypatch):
    monkeypatch.setattr("duollm.convert.linear_small._RIDGE", 1e-9)
    states_ND, outputs_ND, weights_N = rows(rank=3)
    small = fitted(3, states_ND, outputs_ND, weights_N)
    torch.testing.assert_close(small(states_ND), outputs_ND, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_of_all_maps_of_its_rank_it_is_the_best(monkeypatch, rank):
    """The naive truth: the singular values of the whitened regression that are cut off are the error."""
    monkeypatch.setattr("duollm.convert.linear_small._RIDGE", 1e-9)
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
