"""Selection noise, the predictable ceiling and the decomposition, on planted gains."""

import json
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from duollm.analysis.analyse import analyse
from picking import pick
from synthetic_ceiling import write_ceiling
from synthetic_run import Plan, write_parquet, write_run

GAINS = ("gain", "gain_drawn", "second_draw", "gain_beyond_drawn")


@pytest.fixture(scope="module")
def analysed(tmp_path_factory):
    run = tmp_path_factory.mktemp("ceiling")
    truths = write_run(run, Plan(tokens_per_document=100))
    write_ceiling(run, truths, (2, 3))
    return run, truths, analyse(run, 200)


def _mean(run, folder, domain, column):
    return pq.read_table(run / folder / f"{domain}.parquet").column(column).to_numpy().astype(float).mean()


def _static(results, domain, k):
    return pick(results.nll, domain=domain, policy="static", big_layers=k).nll.value


class TestSelectionNoise:
    def test_gains_equal_the_means_of_the_columns(self, analysed):
        run, _, results = analysed
        row = pick(results.selection_noise, domain="prose", big_layers=2)
        expected, drawn, second, best = (
            _mean(run, "oracle", "prose", f"{column}_k2")
            for column in ("expected_static", "resampled_nll_shared", "resampled_score_shared", "nll_shared")
        )
        gain = _static(results, "prose", 2) - best
        wanted = [gain, expected - drawn, expected - second, gain - (expected - drawn)]
        assert [getattr(row, name).value for name in GAINS] == pytest.approx(wanted)
        for name in GAINS:
            assert getattr(row, name).low < getattr(row, name).value < getattr(row, name).high

    @pytest.mark.parametrize("domain", ["code", "prose", "pooled"])
    def test_what_was_planted_is_found(self, analysed, domain):
        row = pick(analysed[2].selection_noise, domain=domain, big_layers=3)
        assert row.gain_drawn.value == pytest.approx(0.4, abs=0.05)
        assert row.second_draw.high < 0

    def test_budgets_with_a_single_route_are_left_out(self, analysed):
        rows = [row for row in analysed[2].selection_noise if row.domain == "code"]
        assert [(row.context, row.big_layers) for row in rows] == [("shared", k) for k in range(1, 6)]

    def test_pooled_is_the_mean_over_all_tokens(self, analysed):
        rows = {row.domain: row for row in analysed[2].selection_noise if row.big_layers == 4}
        for name in GAINS:
            single = [getattr(rows[domain], name).value for domain in ("code", "prose")]
            assert getattr(rows["pooled"], name).value == pytest.approx(np.mean(single))


class TestCeiling:
    @pytest.mark.parametrize(("k", "depth"), [(2, 2), (3, 5)])
    def test_the_chosen_depth_stands_beside_the_other_policies(self, analysed, k, depth):
        run, _, results = analysed
        for name, column in (
            ("ceiling", f"average_l{depth}"),
            ("ceiling-exact", f"exact_l{depth}"),
            ("ceiling-shuffled", "average_shuffled"),
            ("ceiling-shuffled-exact", "exact_shuffled"),
        ):
            row = pick(results.nll, domain="prose", policy=name, big_layers=k)
            assert row.nll.value == pytest.approx(_mean(run, "ceiling", "prose", f"nll_{column}_k{k}"))
            assert row.kind is None
        assert not [row for row in results.nll if row.policy.startswith("predictor")]

    def test_gains_are_over_static_at_what_was_spent(self, analysed):
        run, truths, results = analysed
        static, of_code = _static(results, "code", 3), {"domain": "code", "shuffled": False, "big_layers": 3}
        for depth in (0, 2, 5):
            exact = pick(results.ceiling, depth=depth, spend="exact", **of_code)
            loss = _mean(run, "ceiling", "code", f"nll_exact_l{depth}_k3")
            assert exact.gain.value == pytest.approx(static - loss)
            assert exact.mean_big_layers == 3
            assert exact.chosen == (depth == 5)
        routes = pq.read_table(run / "ceiling" / "code.parquet").column("route_average_l5_k3").to_numpy()
        average = pick(results.ceiling, depth=5, spend="average", **of_code)
        assert average.mean_big_layers == pytest.approx(truths["code"].space.count_big(routes).mean())
        loss = _mean(run, "ceiling", "code", "nll_average_l5_k3")
        assert average.gain.value == pytest.approx(static - loss, abs=1e-9)

    def test_pooled_is_the_mean_over_all_tokens(self, analysed):
        keys = {"depth": 5, "shuffled": False, "spend": "exact", "big_layers": 2}
        domains = ("code", "prose", "pooled")
        gains = {domain: pick(analysed[2].ceiling, domain=domain, **keys).gain.value for domain in domains}
        assert gains["pooled"] == pytest.approx((gains["code"] + gains["prose"]) / 2)


class TestDecomposition:
    PARTS = ("total", "predictable", "noise", "rest", "shuffled")

    def test_the_parts_add_up_to_the_oracles_gain(self, analysed):
        results = analysed[2]
        assert {(row.domain, row.big_layers) for row in results.decomposition} == {
            (domain, k) for domain in ("code", "prose", "pooled") for k in (2, 3)
        }
        for row in results.decomposition:
            noise = pick(results.selection_noise, domain=row.domain, context="shared", big_layers=row.big_layers)
            assert (row.total.value, row.noise.value) == pytest.approx((noise.gain.value, noise.gain_drawn.value))
            assert row.predictable.value + row.noise.value + row.rest.value == pytest.approx(row.total.value)
            for part in self.PARTS:
                assert getattr(row, part).low < getattr(row, part).value < getattr(row, part).high

    def test_predictable_is_the_exact_ceiling_over_static(self, analysed):
        run, _, results = analysed
        row, static = pick(results.decomposition, domain="prose", big_layers=3), _static(results, "prose", 3)
        for part, column in ((row.predictable, "exact_l5"), (row.shuffled, "exact_shuffled")):
            assert part.value == pytest.approx(static - _mean(run, "ceiling", "prose", f"nll_{column}_k3"))

    def test_intervals_are_paired(self, analysed):
        """Documents differ by tenths of a nat, the planted gain of 0.1 does not."""
        part = pick(analysed[2].decomposition, domain="prose", big_layers=3).predictable
        nll = pick(analysed[2].nll, domain="prose", policy="ceiling-exact", big_layers=3).nll
        assert part.high - part.low < 0.3 * (nll.high - nll.low)


def test_nothing_where_nothing_was_measured(tmp_path):
    write_run(tmp_path, Plan(measures=False))
    results = analyse(tmp_path, 50)
    assert results.selection_noise == results.ceiling == results.decomposition == []
    assert not [row for row in results.nll if row.policy.startswith("ceiling")]


class TestUnits:
    def test_a_run_without_units_has_no_rows(self, analysed):
        assert analysed[2].units == []

    def test_rows_are_the_means_of_their_columns_beside_those_of_single_tokens(self, tmp_path):
        write_run(tmp_path, Plan(tokens_per_document=20))
        raised = {
            "nll": ("nll_shared", 0.1),
            "drawn": ("resampled_nll_shared", 0.2),
            "second": ("resampled_score_shared", 0.3),
        }
        for path in (tmp_path / "oracle").glob("*[a-z].parquet"):
            table = pq.read_table(path)
            facts = json.loads(table.schema.metadata[b"duollm"]) | {"units": [8]}
            if "nll_shared_k2" not in table.column_names:
                continue
            for name, (column, by) in raised.items():
                values = table.column(f"{column}_k2").to_numpy() + by
                table = table.append_column(f"unit8_{name}_shared_k2", pa.array(values))
            pq.write_table(table.replace_schema_metadata({"duollm": json.dumps(facts)}), path)
        results = analyse(tmp_path, 50)
        token, unit = (pick(results.units, domain="pooled", unit=unit, big_layers=2) for unit in (1, 8))
        alone = pick(results.selection_noise, domain="pooled", big_layers=2)
        assert [getattr(token, name) for name in GAINS] == [getattr(alone, name) for name in GAINS]
        less = [getattr(token, name).value - getattr(unit, name).value for name in GAINS]
        assert less == pytest.approx([0.1, 0.2, 0.3, -0.1], abs=1e-6)
        assert {(row.unit, row.big_layers) for row in results.units if row.unit > 1} == {(8, 2)}
        assert not any(row.policy.startswith("unit") for row in results.nll)


class TestTries:
    PLANTED: ClassVar = {"text": 0.5, "expected": 0.1, "drawn1": 0.4, "second1": -0.2, "drawn2": 0.3, "second2": 0.2}
    """What is gained with three routes tried; with one, the same less 1."""

    def test_a_run_of_old_has_no_rows(self, analysed):
        assert analysed[2].tries == []

    def test_gains_are_over_static_on_the_counted_tokens(self, tmp_path):
        write_run(tmp_path, Plan(documents=8))
        for path in sorted((tmp_path / "oracle").glob("*.parquet")):
            table = pq.read_table(path)
            if "nll_shared_k2" not in table.column_names:
                continue
            facts = json.loads(table.schema.metadata[b"duollm"])
            counted_T = np.arange(table.num_rows) % 2 == 0
            table = table.append_column("counted", pa.array(counted_T))
            for k in (0, 2):
                table = table.append_column(f"nll_static_k{k}", table.column("nll_big"))
            pq.write_table(table.replace_schema_metadata({"duollm": json.dumps(facts)}), path)
            scored = table.to_pandas()[counted_T].groupby("document")
            static, expected = (scored[name].sum() for name in ("nll_big", "expected_static_k2"))
            rows = [(document, k, tried) for document in static.index for k in (0, 2) for tried in (1, 3)]
            columns = dict(zip(("document", "big_layers", "drawn"), zip(*rows, strict=True), strict=True))
            for name, gain in self.PLANTED.items():
                base = static if name == "text" else expected
                columns["nll_sum" if name == "text" else f"{name}_sum"] = [
                    base[document] - scored.size()[document] * (gain - (tried == 1)) for document, _, tried in rows
                ]
            write_parquet(path.with_suffix(".best_of.parquet"), columns, facts)
        results = analyse(tmp_path, 50)
        assert {(row.domain, row.big_layers) for row in results.tries} == {(d, 2) for d in ("code", "prose", "pooled")}
        row = pick(results.tries, domain="pooled", big_layers=2)
        assert (row.tried, row.labels) == ([1, 3], [1, 2])
        names = {"text": "gain", "drawn1": "gain_drawn", "second1": "second_draw", "expected": "gain_expected"}
        for name, field in names.items():
            found = getattr(row, field)
            wanted = [self.PLANTED[name] - 1] * 3, [self.PLANTED[name]] * 3
            for one, each in zip(found, wanted, strict=True):
                assert (one.value, one.low, one.high) == pytest.approx(each, abs=1e-5)
        assert [one.value for one in row.gain_beyond_drawn] == pytest.approx([0.1, 0.1], abs=1e-5)
        assert [one.value for one in row.gain_by_labels] == pytest.approx([0.4, 0.3], abs=1e-5)
        assert [one.value for one in row.second_by_labels] == pytest.approx([-0.2, 0.2], abs=1e-5)
