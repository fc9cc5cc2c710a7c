"""The bias of an oracle in low precision: measured on a sample, and said by the stage."""

import torch

from duollm import RouteSpace, loss_table, search_oracle
from duollm.oracle.budgets import Exactly
from duollm.oracle.run import describe_bias, rounding_bias
from naive_oracle import tiny_model, tiny_tokens

SPACE, BUDGETS = RouteSpace(num_layers=3), [Exactly(1), Exactly(2)]


def test_the_bias_is_how_far_the_minimum_of_rounded_losses_lies_below():
    model, tokens = tiny_model().to(torch.bfloat16), tiny_tokens(1, 6)
    found_K = rounding_bias(model, tokens[0], SPACE, BUDGETS, "exact")
    exact = tiny_model().to(torch.bfloat16).float()  # its weights are rounded too
    rounded_TR, exact_TR = (loss_table(each, tokens, SPACE)[0] for each in (model, exact))
    for found, big in zip(found_K, (1, 2), strict=True):
        ids = torch.as_tensor(SPACE.ids_with(big=big))
        expected = (exact_TR[:, ids].amin(-1) - rounded_TR[:, ids].amin(-1)).mean()
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert found_K.abs().max() > 1e-4
    assert model.dtype == torch.bfloat16


def test_products_of_lower_precision_are_compared_with_full_ones(monkeypatch):
    precisions = []

    def searched(*given, **settings):
        precisions.append(torch.get_float32_matmul_precision())
        return search_oracle(*given, **settings)

    monkeypatch.setattr("duollm.oracle.run.search_oracle", searched)
    torch.set_float32_matmul_precision("high")
    try:
        found_K = rounding_bias(tiny_model(), tiny_tokens(1, 6)[0], SPACE, BUDGETS, "exact")
        assert torch.get_float32_matmul_precision() == "high"
        assert "in float32, its products in precision 'high'" in describe_bias(tiny_model(), found_K, BUDGETS, 5)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert precisions == ["high", "highest"]
    assert found_K.abs().max() < 1e-3


def test_a_model_in_float32_has_none():
    assert rounding_bias(tiny_model(), tiny_tokens(1, 6)[0], SPACE, BUDGETS, "exact") is None


def test_the_line_says_the_mean_and_the_largest():
    line = describe_bias(tiny_model().to(torch.float16), torch.tensor([0.001, -0.003]), BUDGETS, 5)
    assert "precision" not in line
    assert "float16" in line
    assert "-0.0010" in line
    assert "-0.0030 (k2)" in line
