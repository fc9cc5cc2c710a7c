import numpy as np
import pyarrow.parquet as pq
import pytest

from duollm.analysis.results import analyse
from duollm.errors import UserError
from synthetic_ceiling import write_ceiling
from synthetic_run import Plan, write_run


@pytest.fixture(scope="module")
def analysed(tmp_path_factory):
    run = tmp_path_factory.mktemp("ceiling")
    truths = write_run(run, Plan(tokens_per_document=100))
    write_ceiling(run, truths, (2, 3))
    return run, truths, analyse(run, 200)


def _pick(rows, **wanted):
    [found] = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return found


def _nll(run, domain, column):
    return pq.read_table(run / "ceiling" / f"{domain}.parquet").column(f"nll_{column}").to_numpy().astype(float).mean()


@pytest.mark.parametrize(("k", "depth"), [(2, 2), (3, 5)])
def test_the_chosen_depth_stands_beside_the_other_policies(analysed, k, depth):
    run, _, results = analysed
    for name, column in (
        ("ceiling", f"average_l{depth}"),
        ("ceiling-exact", f"exact_l{depth}"),
        ("ceiling-shuffled", "average_shuffled"),
        ("ceiling-shuffled-exact", "exact_shuffled"),
    ):
        row = _pick(results["nll"], domain="prose", policy=name, big_layers=k)
        assert row["nll"] == pytest.approx(_nll(run, "prose", f"{column}_k{k}"))
        assert row["kind"] is None


def test_gains_are_over_static_at_what_was_spent(analysed):
    run, truths, results = analysed

    def static(k):
        return _pick(results["nll"], domain="code", policy="static", big_layers=k)["nll"]

    for depth in (0, 2, 5):
        exact = _pick(results["ceiling"], domain="code", depth=depth, shuffled=False, spend="exact", big_layers=3)
        assert exact["gain"] == pytest.approx(static(3) - _nll(run, "code", f"exact_l{depth}_k3"))
        assert exact["mean_big_layers"] == 3
        assert exact["chosen"] == (depth == 5)
    routes = pq.read_table(run / "ceiling" / "code.parquet").column("route_average_l5_k3").to_numpy()
    spent = truths["code"].space.count_big(routes).mean()
    average = _pick(results["ceiling"], domain="code", depth=5, shuffled=False, spend="average", big_layers=3)
    assert average["mean_big_layers"] == pytest.approx(spent)
    assert average["gain"] == pytest.approx(static(3) - _nll(run, "code", "average_l5_k3"), abs=1e-9)


def test_pooled_is_the_mean_over_all_tokens(analysed):
    _, _, results = analysed
    keys = {"depth": 5, "shuffled": False, "spend": "exact", "big_layers": 2}
    single = [_pick(results["ceiling"], domain=domain, **keys)["gain"] for domain in ("code", "prose")]
    assert _pick(results["ceiling"], domain="pooled", **keys)["gain"] == pytest.approx(np.mean(single))


def test_nothing_where_it_was_not_measured(own_run):
    results = analyse(own_run, 100)
    assert results["ceiling"] == results["decomposition"] == []
    assert not [row for row in results["nll"] if row["policy"].startswith("ceiling")]


def test_a_file_of_other_tokens_is_refused(own_run, tmp_path):
    write_ceiling(tmp_path / "other", write_run(tmp_path / "other", Plan(documents=5)), (2,))
    (tmp_path / "other" / "ceiling").rename(own_run / "ceiling")
    with pytest.raises(UserError, match=r"ceiling/\w+\.parquet: lacks tokens .* run `duollm study` again"):
        analyse(own_run, 100)


class TestDecomposition:
    def test_the_parts_add_up_to_the_oracles_gain(self, analysed):
        _, _, results = analysed
        assert {(row["domain"], row["big_layers"]) for row in results["decomposition"]} == {
            (domain, k) for domain in ("code", "prose", "pooled") for k in (2, 3)
        }
        for row in results["decomposition"]:
            noise = _pick(
                results["selection_noise"], domain=row["domain"], context="shared", big_layers=row["big_layers"]
            )
            assert (row["total"], row["noise"]) == pytest.approx((noise["gain"], noise["gain_drawn"]))
            assert row["predictable"] + row["noise"] + row["rest"] == pytest.approx(row["total"])
            for quantity in ("total", "predictable", "noise", "rest", "shuffled"):
                assert row[f"{quantity}_low"] < row[quantity] < row[f"{quantity}_high"]

    def test_predictable_is_the_exact_ceiling_over_static(self, analysed):
        run, _, results = analysed
        static = _pick(results["nll"], domain="prose", policy="static", big_layers=3)["nll"]
        row = _pick(results["decomposition"], domain="prose", big_layers=3)
        assert row["predictable"] == pytest.approx(static - _nll(run, "prose", "exact_l5_k3"))
        assert row["shuffled"] == pytest.approx(static - _nll(run, "prose", "exact_shuffled_k3"))

    def test_intervals_are_paired(self, analysed):
        """Documents differ by tenths of a nat, the planted gain of 0.1 does not."""
        row = _pick(analysed[2]["decomposition"], domain="prose", big_layers=3)
        nll = _pick(analysed[2]["nll"], domain="prose", policy="ceiling-exact", big_layers=3)
        assert row["predictable_high"] - row["predictable_low"] < 0.3 * (nll["high"] - nll["low"])
