import numpy as np
import pytest
import torch

from duollm.data.packed import Windows
from duollm.flops import sequence_flops
from duollm.measure.executor import policy_losses
from duollm.models.branch import Branch
from duollm.routers.linear import LinearRouter
from duollm.routers.policies import parse_policy
from duollm.saved.model import Routed
from duollm.saved.text import relative_flops, score
from tiny import random_ids, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def windows():
    return Windows(random_ids(batch=3).numpy(), ["a", "a", "b"], [0, 1, 0])


def test_scores_are_the_losses_and_routes_of_each_policy(model, windows):
    routed = [Routed(name, model, parse_policy(name, model)) for name in ("all-big", "routes:210")]
    scored = list(score(routed, windows, batch_size=2))
    assert [each.policy for each in scored] == ["all-big", "routes:210"]
    assert [each.big_share for each in scored] == pytest.approx([1, 1 / 3])
    for each, route in zip(scored, [[2, 2, 2], [2, 1, 0]], strict=True):
        nll_WT, _ = policy_losses(model, torch.from_numpy(windows.token_ids), routes=torch.tensor(route))
        np.testing.assert_allclose(each.columns["nll"], nll_WT.flatten(), atol=1e-5)
        assert set(each.columns["route"]) == {"".join(map(str, route))}
        assert each.columns["document"].tolist() == ["a"] * 16 + ["b"] * 8
        assert each.tokens_per_second > 0


@pytest.mark.parametrize("scope", ["ffn", "layer"])
@pytest.mark.parametrize("route", [[2, 1, 1], [0, 2, 2], [0, 0, 0]], ids=str)
def test_relative_flops_are_those_of_the_route(route, scope):
    model = tiny_model(skip_scope=scope)
    shares = tuple(route.count(branch) / 3 for branch in range(3))
    expected = sequence_flops(model.config, route, 16) / sequence_flops(model.config, 3, 16)
    assert relative_flops(model, shares, 16) == pytest.approx(expected)


def test_what_a_router_computes_counts(model, windows):
    router = LinearRouter(model.config, (Branch.SMALL, Branch.BIG)).eval()  # all small: no score exceeds the other
    free, routed = score([Routed("", model, each) for each in (parse_policy("all-small", model), router)], windows, 4)
    all_big = sequence_flops(model.config, 3, 9) / 9
    assert routed.big_share == 0
    assert routed.relative_flops - free.relative_flops == pytest.approx(router.flops_per_token() / all_big)
