import pytest
import torch

from duollm.evaluate.losses import policy_losses
from tiny import random_ids, random_routes, tiny_model


def plain(model, ids_T, routes):
    """One forward for one window, one token after another."""
    logits = model(ids_T[None], routes=routes).logits[0]
    return torch.stack([-logits[at].log_softmax(-1)[ids_T[at + 1]] for at in range(len(ids_T) - 1)])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
@pytest.mark.parametrize("routes", [random_routes(batch=3), torch.tensor([1, 0, 2])], ids=["WTL", "L"])
def test_losses_and_routes_are_those_of_plain_forwards(routes, batch_size):
    model, ids = tiny_model(), random_ids(batch=3)
    nll_WT, taken_WTL = policy_losses(model, ids, routes=routes, batch_size=batch_size)
    each = routes.expand(3, 9, 3)
    expected = torch.stack([plain(model, *row[:1], row[1][None]) for row in zip(ids, each, strict=True)])
    torch.testing.assert_close(nll_WT, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(taken_WTL, each[:, :-1])


def test_a_policy_chooses_in_every_batch():
    model, ids, routes = tiny_model(), random_ids(batch=4), random_routes(batch=1).expand(2, 9, 3)
    nll_WT, taken_WTL = policy_losses(
        model, ids, policy=lambda layer, states, memory: (routes[..., layer], None), batch_size=2
    )
    given = policy_losses(model, ids, routes=routes.repeat(2, 1, 1))
    torch.testing.assert_close(nll_WT, given[0])
    assert torch.equal(taken_WTL, given[1])


def test_losses_are_float32_even_under_autocast():
    model, ids = tiny_model(), random_ids()
    with torch.autocast("cpu", torch.bfloat16):
        nll_WT, _ = policy_losses(model, ids)
    assert nll_WT.dtype == torch.float32
    torch.testing.assert_close(nll_WT, policy_losses(model, ids)[0], atol=0.2, rtol=0.05)
