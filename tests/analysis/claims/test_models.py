import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from duollm.analysis.claims.models import (
    BY_TASKS,
    model_claims,
    paired_draws,
    scored_domains,
    scored_size,
    task_claim,
    task_draws,
)
from duollm.errors import UserError
from synthetic_scores import write_scores, write_task


def test_draws_are_paired_and_domains_are_taken_together(tmp_path):
    duo, dense = tmp_path / "duo", tmp_path / "dense"
    for domain, more, documents in (("prose", 0.2, 30), ("code", 0.5, 10)):
        write_scores(duo, {"random:0.5": 1.0, "random:0": 2.0}, domain, documents)
        write_scores(dense, {"all-big": 1.0 - more}, domain, documents)
    pairs = [(duo, "random:0.5"), (dense, "all-big")]
    assert scored_domains(duo) == ["code", "prose"]
    difference_X = np.diff(-paired_draws(["prose"], pairs, seed=0))[:, 0]
    np.testing.assert_allclose(difference_X, 0.2, atol=1e-6)  # whatever the resample
    both_X = np.diff(-paired_draws(["prose", "code"], pairs, seed=0))[:, 0]
    assert both_X[0] == pytest.approx((30 * 0.2 + 10 * 0.5) / 40, abs=1e-6)


def test_the_size_of_scores_counts_what_every_policy_shares_once(tmp_path):
    write_scores(tmp_path, {"random:0": 3.0, "random:1": 2.0})
    assert scored_size(tmp_path) == "600 tokens of 30 documents"
    write_task(tmp_path, {"random:0": 0.3, "random:1": 0.4})
    assert scored_size(tmp_path) == "600 tokens of 30 documents, 300 items of tasks"


def test_what_was_not_scored_is_not_measured(tmp_path):
    write_scores(tmp_path / "duo", {"all-big": 1.0})
    pairs = [(tmp_path / "duo", "all-big"), (tmp_path / "duo", "random:0.5")]
    assert paired_draws(["prose"], pairs, seed=0) is None
    assert paired_draws(["code"], pairs, seed=0) is None
    assert paired_draws(scored_domains(tmp_path / "nowhere"), pairs, seed=0) is None


def test_other_text_is_refused(tmp_path):
    write_scores(tmp_path / "duo", {"all-big": 1.0})
    write_scores(tmp_path / "dense", {"all-big": 1.0}, seed=1)
    with pytest.raises(UserError, match=r"dense.score: scored on other text than .*duo.score"):
        paired_draws(["prose"], [(tmp_path / "duo", "all-big"), (tmp_path / "dense", "all-big")], seed=0)


def test_another_file_is_refused(tmp_path):
    (tmp_path / "duo" / "score").mkdir(parents=True)
    pq.write_table(pa.table({"x": [1]}), tmp_path / "duo" / "score" / "prose.parquet")
    with pytest.raises(UserError, match="not what `duollm score` writes"):
        paired_draws(["prose"], [(tmp_path / "duo", "all-big")], seed=0)


def constant(value):
    return np.full(11, value)


@pytest.mark.parametrize(
    ("over", "verdict"),
    [
        ({0.0: 0.3, 0.75: 0.05, 1.0: 0.0}, "reproduced"),
        ({0.0: -0.1, 0.75: 0.05, 1.0: 0.0}, "not reproduced"),
        ({0.0: 0.3, 0.75: 0.15, 1.0: 0.0}, "not reproduced"),
        ({0.0: 0.3, 0.75: 0.05}, "undecided"),  # no dense model as wide as all big
        ({}, "not measured"),
    ],
)
def test_c14_needs_duos_near_dense_when_mostly_big_and_worse_when_small(over, verdict):
    c14, _ = model_claims("prose", {share: constant(value) for share, value in over.items()})
    assert c14.verdict == verdict


@pytest.mark.parametrize(("cost", "verdict"), [(0.1, "reproduced"), (-0.1, "not reproduced")])
def test_c15_needs_freezing_to_cost(cost, verdict):
    _, c15 = model_claims("prose", None, constant(cost))
    assert c15.verdict == verdict


class TestTasks:
    def test_accuracies_are_paired_and_intervals_are_over_documents(self, tmp_path):
        duo, dense = tmp_path / "duo", tmp_path / "dense"
        write_task(duo, {"random:0": 0.4, "random:1": 0.6})
        write_task(dense, {"all-big": 0.6})
        equal_X = np.diff(task_draws([(duo, "random:1"), (dense, "all-big")], seed=0))
        assert not equal_X.any()  # the same items are right, whatever the resample
        draws_X2 = task_draws([(duo, "random:0"), (dense, "all-big")], seed=0)
        behind_X = np.diff(draws_X2)[:, 0]
        assert behind_X[0] == pytest.approx(0.2, abs=0.05)
        assert 0.01 < behind_X[1:].std() < 0.05  # 300 items in 30 documents: 0.023 if they were independent

    def test_tasks_that_only_one_run_has_are_left_out(self, tmp_path):
        write_task(tmp_path / "duo", {"random:0": 0.4})
        write_task(tmp_path / "dense", {"all-big": 0.6}, task="another")
        pairs = [(tmp_path / "duo", "random:0"), (tmp_path / "dense", "all-big")]
        assert task_draws(pairs, seed=0) is None

    def test_other_items_are_refused(self, tmp_path):
        write_task(tmp_path / "duo", {"random:0": 0.4})
        write_task(tmp_path / "dense", {"all-big": 0.6}, documents=10)
        pairs = [(tmp_path / "duo", "random:0"), (tmp_path / "dense", "all-big")]
        with pytest.raises(UserError, match="score both alike"):
            task_draws(pairs, seed=0)

    def test_another_file_is_refused(self, tmp_path):
        (tmp_path / "duo" / "score").mkdir(parents=True)
        (tmp_path / "duo" / "score" / "samples_x.jsonl").write_text('{"policy": "all-big", "acc": 1}')
        with pytest.raises(UserError, match="not samples that `duollm score` writes"):
            task_draws([(tmp_path / "duo", "all-big")], seed=0)

    @pytest.mark.parametrize(
        ("behind", "verdict"),
        [
            ({0.0: 0.1, 0.75: 0.0, 1.0: 0.02}, "reproduced"),
            ({0.0: -0.1, 0.75: 0.0, 1.0: 0.0}, "not reproduced"),
            ({0.0: 0.1, 0.75: 0.1, 1.0: 0.0}, "not reproduced"),
            ({0.0: 0.1, 0.75: 0.0}, "undecided"),
        ],
    )
    def test_the_duo_must_be_as_right_as_dense_when_mostly_big_and_less_when_small(self, behind, verdict):
        claim = task_claim({share: constant(value) for share, value in behind.items()})
        assert (claim.domain, claim.verdict) == (BY_TASKS, verdict)
