"""What fewer tries would have found, against all subsets of routes on losses of whole forward passes."""

from itertools import combinations

import numpy as np
import pytest
import torch

from duollm import RouteSpace, search_oracle
from duollm.oracle.noise import DrawnLabels, DrawnTries, best_of_columns
from duollm.records.best_of import draw_sizes
from naive_oracle import GROUPED, tiny_model, tiny_tokens

COUNTED = torch.tensor([1, 0, 1, 1, 0]).bool()


def expected_pick(choosing_MR, scored_MR, size):
    """The mean over all subsets of `size` routes of what the best of the subset loses, summed over tokens."""
    subsets = [list(subset) for subset in combinations(range(choosing_MR.shape[1]), size)]
    rows = np.arange(len(choosing_MR))
    return np.mean([scored_MR[rows, np.array(s)[choosing_MR[:, s].argmin(1)]].sum() for s in subsets])


@pytest.fixture(scope="module", params=[RouteSpace(3), GROUPED["two groups"]], ids=["layers", "groups"])
def searched(request):
    """A search with three pairs of labels, the log-probabilities of all routes, and labels and surprise [2, S, M]."""
    space, drawn = request.param, DrawnLabels(3)
    model, tokens = tiny_model(space.num_layers), tiny_tokens(1)
    tries = DrawnTries(COUNTED, drawn)
    search_oracle(model, tokens, space, reductions=[drawn, tries])
    routes_RL = space.decode(torch.arange(space.size))
    with torch.no_grad():
        log_p_RMV = torch.stack([model(tokens, routes=each).logits[0, :-1].log_softmax(-1) for each in routes_RL])
        all_big_MV = model(tokens[:, :-1]).logits[0].softmax(-1)
    return space, tries, log_p_RMV[:, COUNTED], all_big_MV[COUNTED], drawn


@pytest.mark.parametrize("labels", [1, 2])
def test_drawn_labels_equal_the_mean_over_all_subsets(searched, labels):
    space, tries, log_p_RMV, _, drawn = searched
    place_M = torch.arange(log_p_RMV.shape[1])
    first, second = (
        np.stack([(-log_p_RMV[:, place_M, label_M]).T - excess_M[:, None] for label_M, excess_M in pairs])
        for pairs in (
            zip(drawn.label_2SN[side][:, COUNTED], drawn.excess_2SN[side][:, COUNTED], strict=True) for side in (0, 1)
        )
    )
    groups = [slice(start, start + labels) for start in range(0, 3 // labels * labels, labels)]
    for big in space.big_layers:
        ids = np.asarray(space.ids_with(big))
        pairs = [(first[group][..., ids].mean(0), second[group][..., ids].mean(0)) for group in groups]
        for place, size in enumerate(draw_sizes(len(ids))):
            picked = np.mean([expected_pick(choosing, choosing, size) for choosing, _ in pairs])
            scored = np.mean([expected_pick(choosing, scored, size) for choosing, scored in pairs])
            assert tries.sums[big][f"drawn{labels}_sum"][place] == pytest.approx(picked, abs=1e-4)
            assert tries.sums[big][f"second{labels}_sum"][place] == pytest.approx(scored, abs=1e-4)


def test_expected_losses_are_those_under_the_prediction(searched):
    space, tries, log_p_RMV, all_big_MV, _ = searched
    expected_MR = -(all_big_MV * log_p_RMV).sum(-1).T.numpy()
    for big in space.big_layers:
        of_budget_MR = expected_MR[:, np.asarray(space.ids_with(big))]
        for place, size in enumerate(draw_sizes(of_budget_MR.shape[1])):
            wanted = expected_pick(of_budget_MR, of_budget_MR, size)
            assert tries.sums[big]["expected_sum"][place] == pytest.approx(wanted, abs=1e-4)


def test_windows_of_a_document_are_added_up():
    one, other = DrawnTries(COUNTED, DrawnLabels()), DrawnTries(COUNTED, DrawnLabels())
    one.sums, other.sums = {1: {"drawn1_sum": np.array([3.0, 1.0])}}, {1: {"drawn1_sum": np.array([5.0, 2.0])}}
    nll_of = {"a": np.array([[1, 4, 9], [7, 2, 9]], np.float32)}
    columns = best_of_columns(nll_of, np.array([1, 1, 0]), [1], {"a": [one, other]})
    assert columns == {
        "document": ["a", "a"],
        "big_layers": [1, 1],
        "tokens": [2, 2],
        "drawn": [1, 2],
        "nll_sum": [7.0, 3.0],
        "drawn1_sum": [8.0, 3.0],
    }
