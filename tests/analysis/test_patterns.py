from itertools import combinations

import numpy as np
import pytest

from duollm.analysis.patterns import best_of, static, whole_document_sums
from duollm.analysis.tables import PatternTable, read_oracle, read_patterns
from duollm.errors import UserError
from duollm.oracle.halves import first_half
from duollm.oracle.order import chance_of_best
from synthetic_run import Plan, write_run


@pytest.mark.parametrize("drawn", [1, 2, 3, 6, 7])
def test_chance_of_best_equals_counting_all_draws(drawn):
    draws = list(combinations(range(7), drawn))
    counted = [sum(min(draw) == rank for draw in draws) / len(draws) for rank in range(7)]
    np.testing.assert_allclose(chance_of_best(7, drawn), counted, atol=1e-12)


def test_chance_of_best_of_a_single_pattern():
    assert chance_of_best(1, 1).tolist() == [1.0]


def test_halves_split_evenly_by_the_seed():
    halves = [first_half(10, seed) for seed in (0, 0, 1)]
    assert halves[0].sum() == 5
    assert np.array_equal(halves[0], halves[1])
    assert not np.array_equal(halves[0], halves[2])


def test_halves_need_two_documents():
    with pytest.raises(UserError, match="at least 2 per domain, got 1"):
        first_half(1, 0)


def test_best_of_equals_a_plain_loop_over_all_draws():
    nll_sum_DR = np.random.default_rng(0).normal(10, 1, (6, 5))
    in_first_D = first_half(6, 0)
    expected_D = np.zeros(6)
    draws = list(combinations(range(5), 3))
    for document in range(6):
        choosing = in_first_D != in_first_D[document]
        for draw in draws:
            chosen = min(draw, key=lambda route: nll_sum_DR[choosing, route].sum())
            expected_D[document] += nll_sum_DR[document, chosen] / len(draws)
    np.testing.assert_allclose(best_of(nll_sum_DR, [3], in_first_D)[0], expected_D)


def test_best_of_one_is_the_mean_and_best_of_all_is_static():
    nll_sum_DR = np.random.default_rng(0).normal(10, 1, (8, 20))
    in_first_D = first_half(8, 0)
    one, everything, beyond = best_of(nll_sum_DR, [1, 20, 100], in_first_D)
    np.testing.assert_allclose(one, nll_sum_DR.mean(1))
    np.testing.assert_allclose(everything, static(nll_sum_DR, in_first_D))
    np.testing.assert_allclose(beyond, everything)


def test_static_on_pure_noise_gains_nothing():
    nll_sum_DR = np.random.default_rng(0).normal(0, 1, (400, 300))
    totals_D = static(nll_sum_DR, first_half(400, 0))
    assert nll_sum_DR.mean(0).min() < -0.1
    assert abs(totals_D.mean()) < 0.1


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """A domain whose patterns were run on a quarter of the tokens, with its truth."""
    run = tmp_path_factory.mktemp("sampled")
    truth = write_run(run, Plan(counted_share=0.25, tokens_per_document=40, noise=0.05))["prose"]
    oracle = read_oracle(run, "prose")
    return oracle, read_patterns(run, oracle), truth


def _errors(estimate_DR, truth):
    """Absolute errors in nats per token, over all documents, of every route."""
    return np.abs(estimate_DR.sum(0) - truth.nll_TR.sum(0)) / len(truth.nll_TR)


def test_all_small_and_all_big_are_exact_on_a_sample(sampled):
    oracle, patterns, truth = sampled
    assert patterns.counted_D.tolist() == [10] * 12
    assert _errors(whole_document_sums(oracle, patterns), truth)[[0, -1]] == pytest.approx(0, abs=1e-9)


def test_a_sample_is_extended_better_than_by_scaling(sampled):
    oracle, patterns, truth = sampled
    extended, scaled = whole_document_sums(oracle, patterns), patterns.nll_sum_DR * 4
    assert _errors(extended, truth).mean() < 0.5 * _errors(scaled, truth).mean()


def test_extension_is_unbiased(sampled):
    """Over many random samples the mean estimate is the sum over all tokens."""
    oracle, _, truth = sampled
    generator, draws = np.random.default_rng(0), []
    for _ in range(300):
        chosen = [generator.choice(np.flatnonzero(truth.document_T == d), 10, replace=False) for d in range(12)]
        sums_DR = np.stack([truth.nll_TR[tokens].sum(0) for tokens in chosen])
        table = PatternTable(np.arange(truth.space.size), sums_DR, np.full(12, 10))
        draws.append(whole_document_sums(oracle, table).sum(0))
    standard_error_R = np.std(draws, axis=0) / np.sqrt(len(draws))
    assert (np.abs(np.mean(draws, axis=0) - truth.nll_TR.sum(0)) <= 4.5 * standard_error_R + 1e-9).all()


def test_nothing_is_estimated_where_all_tokens_are_counted(synthetic):
    oracle = read_oracle(synthetic[0], "prose")
    patterns = read_patterns(synthetic[0], oracle)
    assert whole_document_sums(oracle, patterns) is patterns.nll_sum_DR
