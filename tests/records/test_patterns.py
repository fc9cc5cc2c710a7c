import json
from dataclasses import replace
from itertools import combinations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from duollm.errors import UserError
from duollm.models.branch import Branch
from duollm.records.best_of import chance_of_best
from duollm.records.bootstrap import Bootstrap, interval
from duollm.records.patterns import (
    best_of,
    best_on_other_half,
    first_half,
    read_compared_patterns,
    read_patterns,
    static,
    whole_document_sums,
)
from duollm.records.tokens import read_oracle
from synthetic_run import Plan, write_parquet, write_run


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
    with pytest.raises(UserError, match="at least 2 documents per domain, got 1"):
        first_half(1, 0)


def test_best_of_equals_a_plain_loop_over_all_draws():
    nll_DR = np.random.default_rng(0).normal(10, 1, (6, 5))
    in_first_D = first_half(6, 0)
    expected_D = np.zeros(6)
    draws = list(combinations(range(5), 3))
    for document in range(6):
        choosing = in_first_D != in_first_D[document]
        for draw in draws:
            chosen = min(draw, key=lambda route: nll_DR[choosing, route].sum())
            expected_D[document] += nll_DR[document, chosen] / len(draws)
    np.testing.assert_allclose(best_of(nll_DR, [3], in_first_D)[0], expected_D)


def test_best_of_one_is_the_mean_and_best_of_all_is_static():
    nll_DR = np.random.default_rng(0).normal(10, 1, (8, 20))
    in_first_D = first_half(8, 0)
    one, everything, beyond = best_of(nll_DR, [1, 20, 100], in_first_D)
    np.testing.assert_allclose(one, nll_DR.mean(1))
    np.testing.assert_allclose(everything, static(nll_DR, in_first_D))
    np.testing.assert_allclose(beyond, everything)


def test_static_on_pure_noise_gains_nothing():
    nll_DR = np.random.default_rng(0).normal(0, 1, (400, 300))
    totals_D = static(nll_DR, first_half(400, 0))
    assert nll_DR.mean(0).min() < -0.1
    assert abs(totals_D.mean()) < 0.1


def test_the_interval_of_static_covers_the_true_loss_of_what_was_chosen():
    """300 patterns on 24 documents: the best by eye is 0.2 nats better than it really is."""
    generator, covered = np.random.default_rng(1), 0
    tokens_D, too_low = np.repeat([63, 126, 189], 8), []
    for trial in range(150):
        true_R = 0.02 * generator.normal(size=300)
        mean_DR = true_R + 0.3 * generator.normal(size=(24, 1)) + 0.3 * generator.normal(size=(24, 300))
        nll_DR = mean_DR * tokens_D[:, None]
        in_first_D = first_half(24, trial)
        chosen = {half: true_R[nll_DR[in_first_D != half].sum(0).argmin()] for half in (True, False)}
        truth = sum(tokens_D[in_first_D == half].sum() * chosen[half] for half in chosen) / tokens_D.sum()
        estimate = interval(Bootstrap([tokens_D], 200, trial).ratio(static(nll_DR, in_first_D), tokens_D))
        covered += estimate.low <= truth <= estimate.high
        best = nll_DR.sum(0).argmin()
        too_low.append(true_R[best] - nll_DR[:, best].sum() / tokens_D.sum())
    assert 0.9 <= covered / 150 <= 0.985
    assert np.mean(too_low) > 0.1


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
    extended, scaled = whole_document_sums(oracle, patterns), patterns.nll_DR * 4
    assert _errors(extended, truth).mean() < 0.5 * _errors(scaled, truth).mean()


def test_extension_is_unbiased(sampled):
    """Over many random samples the mean estimate is the sum over all tokens."""
    oracle, patterns, truth = sampled
    generator, draws = np.random.default_rng(0), []
    for _ in range(300):
        chosen = [generator.choice(np.flatnonzero(truth.document_T == d), 10, replace=False) for d in range(12)]
        sums_DR = np.stack([truth.nll_TR[tokens].sum(0) for tokens in chosen])
        drawn = replace(patterns, nll_DR=sums_DR, counted_D=np.full(12, 10))
        draws.append(whole_document_sums(oracle, drawn).sum(0))
    standard_error_R = np.std(draws, axis=0) / np.sqrt(len(draws))
    assert (np.abs(np.mean(draws, axis=0) - truth.nll_TR.sum(0)) <= 4.5 * standard_error_R + 1e-9).all()


def test_nothing_is_estimated_where_all_tokens_are_counted(synthetic):
    oracle = read_oracle(synthetic[0], "prose")
    patterns = read_patterns(synthetic[0], oracle)
    assert whole_document_sums(oracle, patterns) is patterns.nll_DR


def _rewrite(path, change, **facts):
    table = change(pq.read_table(path))
    known = json.loads(table.schema.metadata[b"duollm"]) | facts
    write_parquet(path, {name: table.column(name) for name in table.column_names}, known)


def test_patterns_on_fewer_tokens_must_say_so(own_run):
    path, oracle = own_run / "oracle" / "prose.routes.parquet", read_oracle(own_run, "prose")
    fewer = pa.array(np.full(12 * 64, 19), pa.int32())
    _rewrite(path, lambda table: table.set_column(3, "tokens", fewer))
    with pytest.raises(UserError, match="token counts are not those of"):
        read_patterns(own_run, oracle)
    _rewrite(path, lambda table: table, counted_share=0.95)
    assert read_patterns(own_run, oracle).counted_D.tolist() == [19] * 12


def test_patterns_follow_the_oracles_documents_whatever_their_order(own_run, synthetic):
    path = own_run / "oracle" / "prose.routes.parquet"
    shuffled = np.random.default_rng(0).permutation(pq.read_metadata(path).num_rows)
    _rewrite(path, lambda table: table.take(shuffled))
    truth = synthetic[1]["prose"]
    patterns = read_patterns(own_run, read_oracle(own_run, "prose"))
    expected_DR = np.stack([truth.nll_TR[truth.document_T == d].sum(0) for d in range(12)])
    np.testing.assert_allclose(patterns.nll_DR, expected_DR)
    assert patterns.counted_D.tolist() == [20] * 12
    for branch, route in ((Branch.SMALL, 0), (Branch.BIG, 63)):
        np.testing.assert_allclose(patterns.uniform(branch), expected_DR[:, route])
    assert patterns.uniform(Branch.SKIP) is None
    assert {k: nll_DR.shape[1] for k, nll_DR in patterns.by_budget()} == {0: 1, 1: 6, 2: 15, 3: 20, 4: 15, 5: 6, 6: 1}


def test_incomplete_patterns(own_run):
    _rewrite(own_run / "oracle" / "prose.routes.parquet", lambda table: table.slice(5))
    with pytest.raises(UserError, match="lack some routes"):
        read_patterns(own_run, read_oracle(own_run, "prose"))


def test_patterns_of_other_documents(own_run):
    oracle = read_oracle(own_run, "prose")
    code = own_run / "oracle" / "code.routes.parquet"
    code.rename(own_run / "oracle" / "prose.routes.parquet")
    with pytest.raises(UserError, match="documents are not those of"):
        read_patterns(own_run, oracle)


def test_there_may_be_no_more_text_than_the_oracles(synthetic):
    assert read_compared_patterns(synthetic[0], "prose") is None


@pytest.mark.parametrize("documents", [2, 3, 10, 11])
def test_half_of_the_documents_rounded_down(documents):
    assert first_half(documents, seed=0).sum() == documents // 2


def test_the_split_depends_on_the_seed_alone():
    assert first_half(20, 1).tolist() == first_half(20, 1).tolist()
    assert first_half(20, 1).tolist() != first_half(20, 2).tolist()


@pytest.mark.parametrize("documents", [0, 1])
def test_one_document_has_no_halves(documents):
    with pytest.raises(UserError, match=rf"^[^\n]*at least 2 documents per domain, got {documents}$"):
        first_half(documents, 0)


def test_a_document_never_takes_part_in_the_choice_it_is_scored_by():
    random = np.random.default_rng(0)
    nll_DR, in_first_D = random.random((9, 5)), first_half(9, 0)
    chosen_D = best_on_other_half(nll_DR, in_first_D)
    for document in range(9):
        others = [other for other in range(9) if in_first_D[other] != in_first_D[document]]
        assert chosen_D[document] == nll_DR[others].sum(0).argmin()
        changed_DR = nll_DR.copy()
        changed_DR[document] = random.random(5) * 100
        assert best_on_other_half(changed_DR, in_first_D)[document] == chosen_D[document]


def test_ties_go_to_the_first_route():
    assert best_on_other_half(np.ones((4, 3)), first_half(4, 0)).tolist() == [0, 0, 0, 0]
