from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from duollm.models.branch import Branch
from duollm.routes.sampling import RandomSplit, derived_seed, draw_route_ids, exact_counts
from duollm.routes.space import RouteSpace

SKIP, SMALL, BIG = Branch


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.integers(0, 1000), st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0.01, 1)))
def test_counts_are_whole_complete_and_off_by_less_than_one(tokens, weights):
    shares = np.array(weights) / sum(weights)
    counts = exact_counts(tokens, shares)
    assert sum(counts) == tokens
    assert min(counts) >= 0
    assert np.abs(np.array(counts) - shares * tokens).max() <= 1


@pytest.mark.parametrize(
    ("tokens", "shares", "expected"),
    [(10, (0, 0.5, 0.5), (0, 5, 5)), (8, (0.25, 0.25, 0.5), (2, 2, 4)), (7, (1, 0, 0), (7, 0, 0))],
)
def test_every_layer_splits_by_exact_shares(tokens, shares, expected):
    split = RandomSplit(3, tokens, shares, seeded())
    for layer in range(3):
        dispatch, memory = split(layer, None, None)
        assert memory is None
        assert dispatch.counts == expected
        assert torch.bincount(dispatch.choice_N(), minlength=3).tolist() == list(expected)


def test_layers_are_drawn_afresh_and_asking_again_repeats_a_layer():
    split = RandomSplit(4, 64, (0, 0.5, 0.5), seeded())
    drawn = [split(layer, None, None)[0].choice_N() for layer in range(4)]
    assert all(not torch.equal(one, other) for one, other in combinations(drawn, 2))
    assert torch.equal(split(2, None, None)[0].choice_N(), drawn[2])


def test_the_generator_decides():
    first, again, other = (
        RandomSplit(1, 64, (0, 0.5, 0.5), seeded(seed))(0, None, None)[0].choice_N() for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_every_token_is_as_likely_as_any_other():
    generator, draws = seeded(), 4000
    big = sum(RandomSplit(1, 5, (0, 0.6, 0.4), generator)(0, None, None)[0].choice_N() == BIG for _ in range(draws))
    # five standard deviations of a binomial share
    assert (big / draws - 0.4).abs().max() < 5 * (0.4 * 0.6 / draws) ** 0.5


@pytest.mark.parametrize("branches", [(SMALL, BIG), (SKIP, BIG), (SKIP, SMALL, BIG)])
@pytest.mark.parametrize("big", [0, 1, 3, 4])
def test_drawn_routes_have_the_budget_and_are_uniform(branches, big):
    space = RouteSpace(4, branches)
    ids = draw_route_ids(space, big, (50, 400), seeded())
    assert ids.shape == (50, 400)
    assert ids.dtype == torch.int64
    allowed = space.ids_with(big).tolist()
    counts = Counter(ids.flatten().tolist())
    assert set(counts) == set(allowed)
    expected = 20_000 / len(allowed)
    assert max(abs(count - expected) for count in counts.values()) < 5 * expected**0.5


@pytest.mark.parametrize("branches", [(SMALL, BIG), (SKIP, SMALL, BIG)])
@pytest.mark.parametrize("big", [2, 4, 5])
def test_drawn_routes_of_unequal_groups_are_uniform(branches, big):
    space = RouteSpace(8, branches, [[0, 1], [2], [3, 7], [6]], {4: BIG, 5: SKIP})
    ids, counts = draw_route_ids(space, big, (20_000,), seeded()).unique(return_counts=True)
    assert ids.tolist() == space.ids_with(big).tolist()
    expected = 20_000 / len(ids)
    assert (counts - expected).abs().max() < 5 * expected**0.5


def test_impossible_budgets_are_refused():
    with pytest.raises(ValueError, match=r"5 big layers is impossible here; allowed: 0 \.\. 4"):
        draw_route_ids(RouteSpace(4), 5, (1,), seeded())


def test_derived_seeds_differ_with_every_number_and_repeat():
    seeds = [derived_seed(*numbers) for numbers in [(0, 1), (1, 0), (1, 1), (0, 2)]]
    assert len(set(seeds)) == 4
    assert seeds[0] == derived_seed(0, 1)
    assert all(0 <= seed < 2**63 for seed in seeds)
