import pytest
import torch

from duollm.models.linear import FewRowsLinear


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("shape", [(1, 1), (2,), (2, 1), (1, 3), (4,), (2, 5)], ids=str)
def test_any_number_of_rows_is_the_same_map(shape, bias):
    torch.manual_seed(0)
    linear, states = FewRowsLinear(6, 5, bias=bias), torch.randn(*shape, 6)
    with_gradients = linear(states)
    with torch.inference_mode():
        got = linear(states)
    assert got.shape == (*shape, 5)
    torch.testing.assert_close(got, with_gradients)
    assert with_gradients.requires_grad
