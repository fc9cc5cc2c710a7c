import numpy as np
import pyarrow.parquet as pq
import pytest

from duollm.analysis.policies import pool, score_policies
from duollm.analysis.selection_noise import QUANTITIES, measure_noise, noise_rows, pool_noise
from duollm.analysis.statistics import Bootstrap
from duollm.analysis.tables import read_oracle, read_patterns


@pytest.fixture(scope="module")
def measured(synthetic):
    """Per domain: scores and noise."""
    parts = {}
    for domain in ("code", "prose"):
        oracle = read_oracle(synthetic[0], domain)
        scores = score_policies(oracle, read_patterns(synthetic[0], oracle), [], 0)
        parts[domain] = (scores, measure_noise(oracle, scores))
    return parts


def _row(scores, noise, k):
    rows = noise_rows(scores, noise, Bootstrap(scores.strata, 300, 0))
    return next(row for row in rows if row["big_layers"] == k)


def _column(run, domain, name):
    return pq.read_table(run / "oracle" / f"{domain}.parquet").column(name).to_numpy().astype(np.float64)


def test_equals_the_means_of_the_columns(synthetic, measured):
    scores, noise = measured["prose"]
    row = _row(scores, noise, 2)
    expected_T = _column(synthetic[0], "prose", "expected_static_k2")
    drawn = (expected_T - _column(synthetic[0], "prose", "resampled_nll_shared_k2")).mean()
    second = (expected_T - _column(synthetic[0], "prose", "resampled_score_shared_k2")).mean()
    static = next(one for one in scores.rows if (one.policy, one.big_layers) == ("static", 2))
    gain = (static.nll_D.sum() - _column(synthetic[0], "prose", "nll_shared_k2").sum()) / 240
    assert [row[name] for name in QUANTITIES] == pytest.approx([gain, drawn, second, gain - drawn])
    for name in QUANTITIES:
        assert row[f"{name}_low"] < row[name] < row[f"{name}_high"]


def test_finds_what_was_planted(measured):
    for scores, noise in measured.values():
        row = _row(scores, noise, 3)
        assert row["gain_drawn"] == pytest.approx(0.4, abs=0.05)
        assert row["second_draw_high"] < 0


def test_budgets_with_a_single_route_are_left_out(measured):
    _, noise = measured["code"]
    assert [(one.context, one.big_layers) for one in noise] == [("shared", k) for k in range(1, 6)]


def test_pooled_is_the_mean_over_all_tokens(measured):
    (code, code_noise), (prose, prose_noise) = measured["code"], measured["prose"]
    both = _row(pool([code, prose]), pool_noise([code_noise, prose_noise]), 4)
    single = [_row(code, code_noise, 4), _row(prose, prose_noise, 4)]
    for name in QUANTITIES:
        assert both[name] == pytest.approx(np.mean([row[name] for row in single]))


def test_pool_keeps_only_what_every_domain_has(measured):
    (_, code), (_, prose) = measured["code"], measured["prose"]
    assert [one.big_layers for one in pool_noise([code[1:], prose[:-1]])] == [2, 3, 4]


def test_nothing_where_no_labels_were_drawn(synthetic):
    oracle = read_oracle(synthetic[0], "code")
    scores = score_policies(oracle, read_patterns(synthetic[0], oracle), [], 0)
    oracle.expected_static_T.clear()
    assert measure_noise(oracle, scores) == []
