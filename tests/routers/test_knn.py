import pytest
import torch
from safetensors.torch import load_file

from duollm.config import RouterConfig
from duollm.models.branch import Branch
from duollm.routers.knn import KnnRouter, nearest_mean
from duollm.routers.registry import load_router, make_router, save_router
from duollm.routes.space import RouteSpace
from tiny import random_ids, tiny_model
from tiny_labels import labels_of, made_up_labels
from tiny_training import router_training

LAYERS = 4


@pytest.fixture
def model():
    return tiny_model(num_hidden_layers=LAYERS)


def fitted(model, labels, branches=("small", "big"), **changes):
    router = make_router("knn", model.config, list(branches)).eval()
    router.fit(router_training(model, RouterConfig(**changes), 0.5, labels=labels))
    return router


@pytest.mark.parametrize("neighbours", [1, 3, 99])
def test_the_mean_is_that_of_the_tokens_of_highest_cosine(neighbours):
    generator = torch.Generator().manual_seed(0)
    states, keys, losses = (torch.randn(*shape, generator=generator) for shape in ((2, 5, 6), (20, 6), (20, 3)))
    found = nearest_mean(states, torch.nn.functional.normalize(keys, dim=-1), losses, neighbours)
    for row, token in torch.cartesian_prod(torch.arange(2), torch.arange(5)).tolist():
        cosines = [torch.cosine_similarity(states[row, token], key, dim=0).item() for key in keys]
        nearest = sorted(range(20), key=lambda each: -cosines[each])[:neighbours]
        torch.testing.assert_close(found[row, token], losses[nearest].mean(0))


def test_a_labelled_token_takes_the_route_that_its_own_label_favours(model):
    """With one neighbour, the nearest labelled token is itself."""
    labels = made_up_labels(RouteSpace(LAYERS), windows=16)
    router = fitted(model, labels, neighbours=1, decide_at=0, codebook_routes=6)
    used = int(router.bias_R.isfinite().sum())
    assert used > 1
    taken_WNL = model(labels.token_ids_WT[:, :-1], policy=router).routes
    indices = labels.with_big(1, 3)
    losses_WNR = labels.losses(indices, 0.0)
    ids_R = labels.route_ids_R[indices].tolist()
    columns = [ids_R.index(int(labels.space.encode(route_L))) for route_L in router.routes_RL[:used]]
    best_WN = losses_WNR[..., columns].argmin(-1)
    # The same token in the same place has the same state at layer 0, whatever stood before it.
    right_WN = (taken_WNL == router.routes_RL[best_WN]).all(-1)
    assert right_WN.float().mean() > 0.9


def test_it_predicts_tokens_that_it_has_not_seen(model):
    """Which of two routes is good depends on the token, whose state at layer 0 says which token it is."""
    space = RouteSpace(LAYERS)
    first, second = (space.encode(torch.tensor(route)) for route in ([1, 2, 2, 1], [2, 1, 1, 2]))
    ids_WT = random_ids(256, 8, seed=7)

    def favoured(ids):
        return torch.where(ids % 2 == 0, first, second)

    losses = torch.ones(256, 7, space.size).scatter_(-1, favoured(ids_WT)[:, :-1, None], 0.0)
    router = fitted(model, labels_of(space, ids_WT, losses), decide_at=0, neighbours=3)
    ids = random_ids(32, 8, seed=11)
    taken = space.encode(model(ids, policy=router).routes)
    assert (taken == favoured(ids)).float().mean() > 0.8


def test_no_token_chooses_a_route_by_its_own_label(model):
    router, noise = make_router("knn", model.config, ["small", "big"]), torch.Generator().manual_seed(3)
    states_MD, loss_MR = (torch.randn(80, size, generator=noise) for size in (16, 5))
    fold_M = torch.arange(80) // 20
    predicted_MR = router.cross_fit(states_MD, loss_MR, fold_M, RouterConfig(neighbours=1))
    changed = loss_MR.clone()
    changed[fold_M == 2] += 1.0
    again_MR = router.cross_fit(states_MD, changed, fold_M, RouterConfig(neighbours=1))
    assert torch.equal(again_MR[fold_M == 2], predicted_MR[fold_M == 2])
    assert not torch.equal(again_MR[fold_M == 1], predicted_MR[fold_M == 1])


def test_a_saved_router_keeps_its_tokens(model, tmp_path):
    router = fitted(model, made_up_labels(RouteSpace(LAYERS), windows=13), neighbours=5, decide_at=2)
    save_router(router, tmp_path / "saved", {"kind": "knn", "branches": ["small", "big"]})
    assert load_file(tmp_path / "saved" / "router.safetensors")["keys_MD"].shape == (13 * 7, 16)
    loaded, _ = load_router(tmp_path / "saved", model.config)
    assert (loaded.decide_at, loaded.neighbours) == (2, 5)
    ids = random_ids()
    assert torch.equal(model(ids, policy=loaded).routes, model(ids, policy=router).routes)


def test_skip_may_be_among_the_branches(model):
    labels = made_up_labels(RouteSpace(LAYERS, tuple(Branch)), windows=16)
    router = fitted(model, labels, ["skip", "small", "big"], decide_at=0, neighbours=2)
    assert (model(random_ids(), policy=router).routes == Branch.SKIP).any()


def test_flops_are_those_of_all_keys_and_of_the_mean(make_random):
    router = make_random(kind=KnnRouter)
    router.neighbours = 8
    assert router.flops_per_token() == 2 * 64 * 16 + 8 * 32
