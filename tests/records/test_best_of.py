from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duollm.records.best_of import chance_of_best, draw_sizes, expected_best, read_best_of
from duollm.records.tokens import read_oracle
from synthetic_run import write_parquet


@given(routes=st.integers(1, 7), seed=st.integers(0, 1000), ties=st.booleans())
def test_expected_best_is_the_mean_over_all_draws(routes, seed, ties):
    random = np.random.default_rng(seed)
    nll_MR = random.integers(0, 3, (3, routes)).astype(float) if ties else random.random((3, routes))
    sizes = range(1, routes + 1)
    for size, found_M in zip(sizes, expected_best(nll_MR, sizes), strict=True):
        naive_M = np.mean([nll_MR[:, list(drawn)].min(1) for drawn in combinations(range(routes), size)], axis=0)
        np.testing.assert_allclose(found_M, naive_M)


@pytest.mark.parametrize(("routes", "drawn"), [(1, 1), (6, 1), (6, 4), (6, 6), (924, 100), (30_000, 20_000)])
def test_chances_are_a_distribution_over_the_ranks_that_can_be_best(routes, drawn):
    chance_R = chance_of_best(routes, drawn)
    assert chance_R.sum() == pytest.approx(1)
    assert chance_R[0] == pytest.approx(drawn / routes)
    assert (chance_R[routes - drawn + 1 :] == 0).all()
    assert (np.diff(chance_R) <= 1e-12).all()


@pytest.mark.parametrize(
    ("routes", "sizes"),
    [
        (1, [1]),
        (2, [1, 2]),
        (12, [1, 2, 5, 10, 12]),
        (100, [1, 2, 5, 10, 20, 50, 100]),
        (924, [1, 2, 5, 10, 20, 50, 100, 200, 500, 924]),
    ],
)
def test_sizes_are_round_and_end_with_all(routes, sizes):
    assert draw_sizes(routes) == sizes


def test_a_run_may_lack_the_file(synthetic):
    assert read_best_of(synthetic[0], read_oracle(synthetic[0], "prose")) == {}


def test_the_best_of_random_routes_is_read_by_budget_size_and_document(own_run):
    oracle = read_oracle(own_run, "prose")
    names = [oracle.documents[1], oracle.documents[0]]
    rows = [(name, k, size) for name in names for k in (2, 3) for size in (1, 5)]
    columns = dict(zip(("document", "big_layers", "drawn"), map(list, zip(*rows, strict=True)), strict=True))
    sums = [float(10 * k + size + (name == names[0])) for name, k, size in rows]
    write_parquet(own_run / "oracle" / "prose.best_of.parquet", {**columns, "nll_sum": sums}, {"num_layers": 6})
    found = read_best_of(own_run, oracle)
    assert list(found) == [2, 3]
    assert found[3].drawn == [1, 5]
    assert found[3].nll_DN[:2].tolist() == [[31, 35], [32, 36]]
