import numpy as np
import pytest
import torch

from duollm import Branch, RouteSpace
from duollm.data.packed import Windows
from duollm.oracle.fixed import draw_patterns, fixed_columns, pattern_losses
from duollm.records.patterns import first_half
from naive_oracle import forward_nll, tiny_model, tiny_tokens

SPACE, SEED, BUDGETS = RouteSpace(3), 0, [0, 1, 2]
WINDOWS = Windows(tiny_tokens(6, 5).numpy(), ["a", "a", "b", "c", "c", "d"], [0, 1, 0, 0, 1, 0])
DOCUMENT_W = [0, 0, 1, 2, 2, 3]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def naive_nll(model, window, route):
    return forward_nll(model, torch.from_numpy(WINDOWS.token_ids[window])[None], torch.as_tensor(route))[0]


def chosen_routes(sums_DR, pattern_R, big):
    """The best pattern of each document's other half, by plain loops."""
    in_first_D = first_half(4, SEED)
    routes = []
    for document in range(4):
        others = [other for other in range(4) if in_first_D[other] != in_first_D[document]]
        allowed = [r for r, pattern in enumerate(pattern_R) if SPACE.count_big(pattern) == big]
        routes.append(SPACE.decode(pattern_R[min(allowed, key=lambda r: sums_DR[others, r].sum())]))
    return routes


@pytest.mark.parametrize("pattern_R", [np.arange(8), np.array([0, 2, 4, 5, 7])], ids=["all", "drawn"])
@pytest.mark.parametrize("batch", [1, 4, 100])
def test_columns_are_those_of_ordinary_forward_passes(model, monkeypatch, pattern_R, batch):
    monkeypatch.setattr("duollm.oracle.fixed._BATCH", batch)
    sums_DR = np.random.default_rng(1).random((4, len(pattern_R)))
    columns = fixed_columns(model, WINDOWS, sums_DR, pattern_R, SPACE, BUDGETS, SEED)
    for name, route in (("nll_small", [1, 1, 1]), ("nll_big", [2, 2, 2])):
        naive = torch.cat([naive_nll(model, window, route) for window in range(6)])
        np.testing.assert_allclose(columns[name], naive, atol=1e-4)
    for big in BUDGETS:
        routes = chosen_routes(sums_DR, pattern_R, big)
        naive = torch.cat([naive_nll(model, window, routes[DOCUMENT_W[window]]) for window in range(6)])
        np.testing.assert_allclose(columns[f"nll_static_k{big}"], naive, atol=1e-4)
        ids = [SPACE.encode(routes[document]) for document in DOCUMENT_W for _ in range(4)]
        assert columns[f"route_static_k{big}"].tolist() == ids


@torch.no_grad()
def test_predictions_are_those_of_all_big(model):
    columns = fixed_columns(model, WINDOWS, np.zeros((4, 8)), np.arange(8), SPACE, [1], SEED)
    p_WTV = model(torch.from_numpy(WINDOWS.token_ids), routes=[2, 2, 2]).logits[:, :-1].softmax(-1)
    order_NV = p_WTV.flatten(0, 1).argsort(-1, descending=True)
    assert columns["top5_id"].reshape(-1, 5).tolist() == order_NV[:, :5].tolist()
    np.testing.assert_allclose(columns["top5_probability"], p_WTV.topk(5).values.flatten(), atol=1e-5)
    labels = WINDOWS.token_ids[:, 1:].flatten().tolist()
    assert columns["rank"].tolist() == [
        row.index(label) + 1 for row, label in zip(order_NV.tolist(), labels, strict=True)
    ]


@torch.no_grad()
def test_expected_static_is_the_mean_over_labels_drawn_from_the_all_big_prediction(model):
    sums_DR = np.random.default_rng(1).random((4, 8))
    columns = fixed_columns(model, WINDOWS, sums_DR, np.arange(8), SPACE, [1], SEED)
    routes, naive = chosen_routes(sums_DR, np.arange(8), 1), []
    for window, document in enumerate(DOCUMENT_W):
        ids = torch.from_numpy(WINDOWS.token_ids[window])[None]
        drawn_from = model(ids, routes=[2, 2, 2]).logits[0, :-1].softmax(-1)
        log_p = model(ids, routes=torch.as_tensor(routes[document])).logits[0, :-1].log_softmax(-1)
        naive.append(-(drawn_from * log_p).sum(-1))
    np.testing.assert_allclose(columns["expected_static_k1"], torch.cat(naive), atol=1e-4)


def test_losses_are_those_of_the_counted_tokens_under_every_pattern(model):
    counted_WN = torch.rand(6, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    pattern_R = np.array([1, 4, 7])
    token_ids_WT = torch.from_numpy(WINDOWS.token_ids)
    label_MD = model.lm_head.weight[token_ids_WT[:, 1:][counted_WN]]
    routes_RL = torch.from_numpy(SPACE.decode(pattern_R))
    [nll_MR] = pattern_losses(model, token_ids_WT, counted_WN, label_MD[None], routes_RL)
    for column, pattern in enumerate(pattern_R):
        naive = torch.stack([naive_nll(model, window, SPACE.decode(pattern)) for window in range(6)])[counted_WN]
        torch.testing.assert_close(nll_MR[:, column], naive, atol=1e-4, rtol=0)


@pytest.mark.parametrize("branches", [(Branch.SMALL, Branch.BIG), tuple(Branch)])
def test_drawn_patterns_are_of_the_budgets_and_hold_all_small_and_all_big(branches):
    space = RouteSpace(30, branches)
    pattern_R = draw_patterns(space, [0, 10, 30], number=5, seed=1)
    assert (np.diff(pattern_R) > 0).all()
    big_R = space.count_big(pattern_R)
    assert (big_R == 10).sum() == 5
    assert set(big_R) == {0, 10, 30}
    assert set(space.encode(np.array([[1] * 30, [2] * 30]))) <= set(pattern_R)
    assert draw_patterns(space, [0, 10, 30], 5, seed=1).tolist() == pattern_R.tolist()
    assert draw_patterns(space, [0, 10, 30], 5, seed=2).tolist() != pattern_R.tolist()
