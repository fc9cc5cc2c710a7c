import pytest
import torch

from duollm.measure.executor import (
    branch_shares,
    deciding_flops,
    policy_losses,
    route_digits,
    token_columns,
)
from duollm.models.branch import Branch
from duollm.routers.linear import LinearRouter
from duollm.routers.policies import parse_policy
from duollm.routes.space import RouteSpace
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


def test_columns_hold_a_row_per_predicted_token():
    space, routes_WTL = RouteSpace(3, tuple(Branch)), random_routes(batch=2)
    columns = token_columns(torch.arange(18.0).view(2, 9), routes_WTL, space, "_k2")
    assert columns["nll_k2"].tolist() == list(range(18))
    assert space.decode(torch.tensor(columns["route_k2"])).equal(routes_WTL.flatten(0, 1))


def test_what_deciding_costs_is_known_of_routers_only():
    model = tiny_model()
    router = LinearRouter(model.config, (Branch.SMALL, Branch.BIG))
    assert deciding_flops(router) == router.flops_per_token() == 2 * 3 * 16
    assert deciding_flops(parse_policy("all-big", model)) == 0


def test_route_digits_are_read_layer_by_layer():
    routes_NL = random_routes().flatten(0, 1)
    assert route_digits(routes_NL).tolist() == ["".join(map(str, route)) for route in routes_NL.tolist()]
    shares = branch_shares(routes_NL)
    assert shares == pytest.approx([(routes_NL == branch).double().mean().item() for branch in range(3)])
