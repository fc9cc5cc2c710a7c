"""Figures show the numbers they are given, and come out the same twice."""

import shutil
import xml.etree.ElementTree as ElementTree

import pytest

from duollm.analysis.results import analyse, main_context_rows
from duollm.analysis.tables import read_oracle, read_routers
from duollm.report.curves import best_of_draws, nll_by_budget
from duollm.report.figures import draw_figures, shown_budget
from duollm.report.layer_figures import share_over_depth, share_over_depth_and_position
from duollm.report.style import policy_look, router_looks


@pytest.fixture(scope="module")
def analysed(synthetic, tmp_path_factory):
    run = tmp_path_factory.mktemp("figures") / "run"
    shutil.copytree(synthetic[0], run)
    results = analyse(run, 100)
    return run, results | {"nll": main_context_rows(results)}


def _line(axes, label):
    return next(line for line in axes.get_lines() if line.get_label() == label)


def test_curves_hold_the_results(analysed):
    results = analysed[1]
    axes = nll_by_budget(results, ["code", "prose"], ["linear"]).axes[1]
    assert axes.get_title() == "prose"
    rows = [row for row in results["nll"] if row["domain"] == "prose"]
    for policy, label in (
        ("oracle", "oracle"),
        ("executed-together", "oracle, executed together"),
        ("static", "static (best fixed pattern)"),
    ):
        expected = {row["big_layers"]: row["nll"] for row in rows if row["policy"] == policy}
        line = _line(axes, label)
        assert dict(zip(line.get_xdata(), line.get_ydata(), strict=True)) == expected


def test_routers_stand_where_they_spend(analysed):
    results = analysed[1]
    spent = results | {"nll": [row | {"mean_big_layers": row["mean_big_layers"] * 0.5} for row in results["nll"]]}
    [axes] = nll_by_budget(spent, ["code"], ["linear"]).axes
    assert list(_line(axes, "router (linear)").get_xdata()) == [0.5, 1.0, 1.5, 2.0, 2.5]


def test_bands_are_paired_differences_put_where_all_big_stands(analysed):
    results = analysed[1]
    [axes] = nll_by_budget(results, ["pooled"], ["linear"]).axes
    rows = [row for row in results["nll"] if row["domain"] == "pooled"]
    big = next(row["nll"] for row in rows if row["policy"] == "all-big")
    oracle = sorted((row for row in rows if row["policy"] == "oracle"), key=lambda row: row["big_layers"])
    edge = {tuple(point) for point in axes.collections[3].get_paths()[0].vertices.round(9)}
    for row in oracle:
        assert (row["big_layers"], round(big + row["over_all_big_low"], 9)) in edge
        assert (row["big_layers"], round(big + row["over_all_big_high"], 9)) in edge


def test_the_close_up_leaves_the_oracle_out(analysed):
    whole, _, close, _ = best_of_draws(analysed[1], 2, ["linear"]).axes
    assert "oracle" in whole.get_legend_handles_labels()[1]
    assert "oracle" not in close.get_legend_handles_labels()[1]


def test_profiles_hold_the_shares(analysed):
    results = analysed[1]
    axes = share_over_depth(results, [2, 3, 4], ["linear"]).axes[1]
    row = next(
        row
        for row in results["layer_use"]
        if (row["domain"], row["policy"], row["big_layers"]) == ("code", "oracle", 3)
    )
    assert list(_line(axes, "oracle").get_ydata()) == row["share_by_layer"]


def test_maps_say_what_was_not_measured(analysed):
    results = analysed[1]
    partial = results | {"layer_use": [row for row in results["layer_use"] if row["policy"] != "linear-k3"]}
    texts = [
        text.get_text()
        for axes in share_over_depth_and_position(partial, [2, 3], ["linear"]).axes
        for text in axes.texts
    ]
    assert texts == ["not measured", "not measured"]


def test_all_figures_twice_the_same(analysed, tmp_path):
    run, results = analysed
    oracles = [read_oracle(run, domain) for domain in results["data"]]
    routers = {oracle.domain: read_routers(run, oracle) for oracle in oracles}
    once, again = (draw_figures(folder, results, oracles, routers) for folder in (tmp_path / "a", tmp_path / "b"))
    assert len(once) == 9
    for name, svg in once.items():
        assert svg.read_bytes() == again[name].read_bytes()
        assert svg.with_suffix(".pdf").read_bytes() == again[name].with_suffix(".pdf").read_bytes()
        ElementTree.parse(svg)


def test_shown_budget_is_a_third_or_the_nearest_searched(analysed):
    oracle = read_oracle(analysed[0], "prose")
    assert shown_budget([oracle]) == 2
    for k in (1, 2, 3):
        del oracle.nll_oracle_T[k]
    assert shown_budget([oracle]) == 0


def test_every_policy_looks_different():
    policies = [
        "oracle",
        "executed-together",
        "static",
        "random-patterns",
        "best-of-100-routes",
        "best-of-100-patterns",
    ]
    looks = [policy_look(policy) for policy in policies]
    looks += router_looks([{"kind": kind, "spend": "average"} for kind in ("linear", "mlp", None)]).values()
    assert len({look.colour for look in looks}) == 8
    assert policy_look("best-of-64-routes").label == "best of 64 random routes per token"


def test_ways_of_spending_share_a_colour_and_stay_apart():
    rows = [{"kind": kind, "spend": spend} for kind in ("gains", "linear") for spend in ("average", "exact")]
    looks = router_looks(rows)
    assert list(looks) == ["gains", "gains, exact", "linear", "linear, exact"]
    assert looks["gains"].colour == looks["gains, exact"].colour != looks["linear"].colour
    assert looks["gains, exact"].style["markerfacecolor"] == "white" != looks["gains"].style["markerfacecolor"]


def test_ten_kinds_look_different():
    looks = router_looks([{"kind": f"kind{i}", "spend": "average"} for i in range(10)])
    assert len({(look.colour, look.marker) for look in looks.values()}) == 10
