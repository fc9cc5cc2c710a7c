import pytest
import torch

from duollm.errors import UserError
from duollm.models.branch import Branch
from duollm.oracle.labels import (
    EXPECTED,
    LARGEST_LABELLED,
    TEXT,
    label_windows,
    load_labels,
    routes_to_label,
    save_labels,
)
from duollm.oracle.search import loss_table
from duollm.routes.space import RouteSpace
from tiny import random_ids, tiny_model

SPACE = RouteSpace(3)
IDS_WT = random_ids(3, 6)


@pytest.fixture(scope="module")
def labels():
    return label_windows(tiny_model(), IDS_WT, SPACE, seed=3)


@pytest.fixture
def mean_of_all_routes(monkeypatch):
    """The expectation is under the mean of all routes, rather than of random ones."""

    def exact_mean(model, ids_BT, space, generator):
        every = [model(ids_BT, routes=route).logits.softmax(-1) for route in space.decode(torch.arange(space.size))]
        return torch.stack(every).mean(0)

    monkeypatch.setattr("duollm.oracle.labels.mean_prediction", exact_mean)
    return exact_mean(tiny_model(), IDS_WT[:, :-1], SPACE, None)


def centred(losses):
    return losses - losses.mean(-1, keepdim=True)


def test_a_pool_is_run_route_by_route_over_whole_windows(mean_of_all_routes):
    pool_R = torch.tensor([0, 3, 6])
    labels = label_windows(tiny_model(), IDS_WT, SPACE, pool_R)
    naive = {TEXT: [], EXPECTED: []}
    for route in SPACE.decode(pool_R):
        log_p_WNV = tiny_model()(IDS_WT[:, :-1], routes=route).logits.log_softmax(-1)
        naive[TEXT].append(-log_p_WNV.gather(-1, IDS_WT[:, 1:, None])[..., 0])
        naive[EXPECTED].append(-(mean_of_all_routes * log_p_WNV).sum(-1))
    for kind, losses in naive.items():
        torch.testing.assert_close(
            labels.losses_SWNR[kind].float(), centred(torch.stack(losses, -1)), atol=4e-3, rtol=0
        )
    assert labels.route_ids_R.equal(pool_R)


def test_a_tokens_own_route_varies_and_the_others_are_random(labels):
    """In a window of two tokens there is nobody before: the table is that of any context."""
    two_WT = IDS_WT[:, :2]
    alone = label_windows(tiny_model(), two_WT, SPACE)
    table = loss_table(tiny_model(), two_WT, SPACE, "shared")
    torch.testing.assert_close(alone.losses_SWNR[TEXT].float(), centred(table), atol=4e-3, rtol=0)
    torch.testing.assert_close(labels.losses_SWNR[TEXT, :, :1], alone.losses_SWNR[TEXT], atol=4e-3, rtol=0)
    other = label_windows(tiny_model(), IDS_WT, SPACE, seed=4)
    assert not torch.allclose(labels.losses_SWNR[:, :, 1:], other.losses_SWNR[:, :, 1:], atol=1e-2)


def test_expected_losses_are_lowest_for_the_prediction_they_are_drawn_from(monkeypatch):
    """In a window of two, where the earlier tokens cannot differ, nothing predicts like all big but all big."""
    all_big = tiny_model()(IDS_WT[:, :1], routes=[2, 2, 2]).logits.softmax(-1)
    monkeypatch.setattr("duollm.oracle.labels.mean_prediction", lambda model, ids_BT, *_: all_big[: len(ids_BT)])
    labels = label_windows(tiny_model(), IDS_WT[:1, :2], SPACE)
    assert (labels.losses_SWNR[EXPECTED].argmin(-1) == SPACE.size - 1).all()


def test_losses_mix_text_and_expectation(labels):
    indices = labels.with_big(1, 2)
    text, expected = (centred(labels.losses_SWNR[kind][..., indices].float()) for kind in (TEXT, EXPECTED))
    torch.testing.assert_close(labels.losses(indices, 1.0), text)
    mixed = labels.losses(indices, 0.25)
    of_routes = [each.mean((0, 1)) for each in (mixed, text, expected)]
    torch.testing.assert_close(of_routes[0], of_routes[1])
    deviations = 0.25 * (text - of_routes[1]) + 0.75 * (expected - of_routes[2])
    torch.testing.assert_close(mixed - of_routes[0], deviations)


def test_routes_are_found_by_budget(labels):
    assert labels.with_big(0, 1).tolist() == [0, 1, 2, 4]
    with pytest.raises(UserError, match=r"no route with 4 \.\. 5 big layers was labelled"):
        labels.with_big(4, 5)


def test_saved_labels_are_read_back(labels, tmp_path):
    save_labels(labels, tmp_path / "labels" / "losses.safetensors")
    loaded = load_labels(tmp_path / "labels" / "losses.safetensors")
    assert loaded.space == labels.space
    for name in ("token_ids_WT", "route_ids_R", "losses_SWNR"):
        assert getattr(loaded, name).equal(getattr(labels, name))


@pytest.mark.parametrize("content", [None, b"", b"damaged" * 9])
def test_damaged_labels_are_refused(tmp_path, content):
    path = tmp_path / "losses.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="not a readable file of labels"):
        load_labels(path)


class TestPool:
    def test_small_spaces_are_labelled_whole(self):
        assert routes_to_label(RouteSpace(14), [4], None, seed=0) is None

    @pytest.mark.parametrize("branches", [(Branch.SMALL, Branch.BIG), tuple(Branch)], ids=["two", "three"])
    def test_others_by_random_routes_around_the_budgets(self, branches):
        space = RouteSpace(16, branches)
        assert space.size > LARGEST_LABELLED
        pool_R = routes_to_label(space, [0, 5], None, seed=0)
        big, counts = space.count_big(pool_R).unique(return_counts=True)
        assert set(big.tolist()) == {0, 1, 4, 5, 6, 16}
        assert counts.max() <= 32 + 1
        assert pool_R.equal(pool_R.sort().values)

    def test_a_given_number_of_routes_makes_a_pool_of_any_space(self):
        pool_R = routes_to_label(RouteSpace(12), [6], 4, seed=0)
        assert 3 * 2 < len(pool_R) <= 3 * 4 + 2
