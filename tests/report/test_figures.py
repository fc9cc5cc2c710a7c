"""Figures show the numbers they are given, and come out the same twice."""

import shutil
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pandas as pd
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from duollm.analysis.analyse import analyse
from duollm.analysis.results import BestOfRow, PolicyRow
from duollm.records.bootstrap import Estimate
from duollm.records.tokens import read_tokens
from duollm.report import figures
from duollm.report.chart import draw_chart
from duollm.report.figures import CAPTIONS, caption, draw_figures, sample, shorten_names
from duollm.report.layer_figures import agreement_over_depth, share_over_depth, share_over_depth_and_position
from duollm.report.loss_figures import best_of_draws, loss_by_cost, nll_by_budget, oracle_sliding
from duollm.report.style import policy_look, router_looks, smaller
from duollm.terminal import one_line
from hidden_intervals import hidden_intervals
from picking import pick


@pytest.fixture(scope="module")
def analysed(synthetic, tmp_path_factory):
    run = tmp_path_factory.mktemp("figures") / "run"
    shutil.copytree(synthetic[0], run)
    return run, analyse(run, 100)


def _line(axes, label):
    return next(line for line in axes.get_lines() if line.get_label() == label)


def test_curves_hold_the_results(analysed):
    results = analysed[1]
    axes = draw_chart(nll_by_budget(results, ["code", "prose"], ["linear"])).axes[1]
    assert axes.get_title() == "prose"
    rows = [row for row in results.main_nll if row.domain == "prose"]
    for policy, label in (
        ("oracle", "oracle"),
        ("executed-together", "oracle, executed together"),
        ("static", "static (best fixed pattern)"),
    ):
        expected = {row.big_layers: row.nll.value for row in rows if row.policy == policy}
        line = _line(axes, label)
        assert dict(zip(line.get_xdata(), line.get_ydata(), strict=True)) == expected


def test_routers_stand_where_they_spend(analysed):
    results = analysed[1]
    rows = [replace(row, mean_big_layers=row.mean_big_layers * 0.5) for row in results.nll]
    [axes] = draw_chart(nll_by_budget(replace(results, nll=rows), ["code"], ["linear"])).axes
    assert list(_line(axes, "router (linear)").get_xdata()) == [0.5, 1.0, 1.5, 2.0, 2.5]


def test_bands_are_paired_differences_put_where_all_big_stands(analysed):
    results = analysed[1]
    [axes] = draw_chart(nll_by_budget(results, ["pooled"], ["linear"])).axes
    rows = [row for row in results.main_nll if row.domain == "pooled"]
    big = pick(rows, policy="all-big").nll.value
    bands = [one for one in axes.collections if isinstance(one, PolyCollection)]
    edge = {tuple(point) for band in bands for point in band.get_paths()[0].vertices.round(9)}
    for row in rows:
        if row.policy == "oracle":
            assert (row.big_layers, round(big + row.over_all_big.low, 9)) in edge
            assert (row.big_layers, round(big + row.over_all_big.high, 9)) in edge


@pytest.mark.parametrize(
    "chart_of",
    [
        lambda results: nll_by_budget(results, ["code", "prose"], ["linear", "gains"]),
        lambda results: best_of_draws(results, 2, ["linear", "gains"]),
        lambda results: oracle_sliding(results),
        lambda results: share_over_depth(results, [2, 3], ["linear", "gains"]),
    ],
)
def test_all_intervals_of_the_papers_figures_can_be_seen(analysed, chart_of):
    chart = chart_of(analysed[1])
    assert set(hidden_intervals(chart, draw_chart(chart))) <= {"even use, k / L"}


def test_a_picture_says_how_much_text_and_which_seed_it_is_drawn_from(analysed):
    results = analysed[1]
    tokens, documents = (sum(getattr(size, name) for size in results.data.values()) for name in ("tokens", "documents"))
    note = sample("nll_by_budget", results)
    assert note == f"n = {tokens:,} tokens of {documents:,} documents; seed {results.provenance['seed']}."
    assert note in " ".join(draw_chart(nll_by_budget(results, ["code"], []), note).get_suptitle().split())


def test_the_close_up_leaves_the_oracle_out(analysed):
    whole, _, close, _ = draw_chart(best_of_draws(analysed[1], 2, ["linear"])).axes
    assert "oracle" in whole.get_legend_handles_labels()[1]
    assert "oracle" not in close.get_legend_handles_labels()[1]


def test_the_best_of_random_routes_is_drawn_beside_that_of_patterns(analysed):
    results, label = analysed[1], "best of N random routes per token"
    estimates = [Estimate(4.0 - n / 10, 3.0, 5.0) for n in range(4)]
    row = BestOfRow("code", 2, 1000, [1, 10, 100, 1000], estimates, estimates)
    code, _, close, _ = draw_chart(best_of_draws(replace(results, best_of_routes=[row]), 2, ["linear"])).axes
    line = _line(code, label)
    assert list(zip(line.get_xdata(), line.get_ydata(), strict=True)) == [(1, 4.0), (10, 3.9), (100, 3.8)]
    assert label not in close.get_legend_handles_labels()[1]
    assert label not in draw_chart(best_of_draws(results, 2, ["linear"])).axes[0].get_legend_handles_labels()[1]


def test_a_sliding_budget_stands_beside_the_constant_one(analysed):
    results = analysed[1]
    axes = draw_chart(oracle_sliding(results)).axes[0]
    [line] = [line for line in axes.get_lines() if line.get_label().startswith("oracle")]
    rows = [row for row in results.main_nll if row.domain == results.domains[0] and row.big_layers == 2]
    expected = {name: pick(rows, policy=name).nll.value for name in ("oracle-ramp1to3", "oracle", "oracle-ramp3to1")}
    assert list(line.get_xdata()) == [-2, 0, 2]
    assert list(line.get_ydata()) == list(expected.values())
    constant = [row for row in results.nll if not row.policy.startswith("oracle-ramp")]
    assert oracle_sliding(replace(results, nll=constant)) is None


def test_profiles_hold_the_shares(analysed):
    results = analysed[1]
    axes = draw_chart(share_over_depth(results, [2, 3, 4], ["linear"])).axes[1]
    row = pick(results.layer_use, domain="code", policy="oracle", big_layers=3)
    assert list(_line(axes, "oracle").get_ydata()) == [share.value for share in row.share_by_layer]


def test_maps_say_what_was_not_measured(analysed):
    results = analysed[1]
    partial = replace(results, layer_use=[row for row in results.layer_use if row.policy != "linear-k3"])
    texts = [
        text.get_text()
        for axes in draw_chart(share_over_depth_and_position(partial, [2, 3], ["linear"])).axes
        for text in axes.texts
    ]
    assert texts == ["not measured", "not measured"]


def test_all_figures_twice_the_same(analysed, tmp_path):
    run, results = analysed
    domains = [read_tokens(run, domain)[0] for domain in results.domains]
    once, again = (draw_figures(folder, results, domains) for folder in (tmp_path / "a", tmp_path / "b"))
    assert len(once) == 13
    assert set(once) <= set(CAPTIONS)
    for name, svg in once.items():
        assert svg.read_bytes() == again[name].read_bytes()
        assert svg.with_suffix(".pdf").read_bytes() == again[name].with_suffix(".pdf").read_bytes()
        assert svg.with_suffix(".csv").read_bytes() == again[name].with_suffix(".csv").read_bytes()
        ElementTree.parse(svg)


def test_a_picture_has_the_number_that_the_paper_gives_it(analysed, tmp_path, monkeypatch):
    results = replace(analysed[1], model=analysed[1].model | {"architecture": "opt"})
    domains = [read_tokens(analysed[0], domain)[0] for domain in results.domains]
    notes = {}
    monkeypatch.setattr(figures, "save", lambda figure, folder, name: notes.update({name: figure.get_suptitle()}))
    draw_figures(tmp_path, analysed[1], domains)
    numbers = {"best_of_draws": "4a", "nll_by_budget": "4b", "oracle_sliding": "4c", "difficulty": "5", "routes": "7"}
    numbers |= {"layer_use": "2", "layer_use_by_position": "3", "losses_of_text": "6"}
    assert {name for name, note in notes.items() if note.startswith("Paper, figure ")} == set(numbers)
    assert {
        name for name, number in numbers.items() if not notes[name].startswith(f"Paper, figure {number}. ")
    } == set()
    draw_figures(tmp_path, results, domains)
    assert notes["layer_use"].startswith("Paper, figure 9. ")


def test_figures_of_an_opt_like_model_are_the_papers_ninth(analysed):
    plain, opt = analysed[1], replace(analysed[1], model=analysed[1].model | {"architecture": "opt"})
    (text, claims), (text_of_opt, claims_of_opt) = (caption("layer_use_by_position", one) for one in (plain, opt))
    assert ("figure 3" in text, "figure 9" in text_of_opt) == (True, True)
    assert (claims, claims_of_opt) == (("C10",), ("C16",))


def _routers(*kinds, spends=("average",)):
    return [PolicyRow("prose", f"{kind}_k2", kind, spend, 2) for kind in kinds for spend in spends]


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
    looks += router_looks(_routers("linear", "mlp")).values()
    assert len({look.colour for look in looks}) == 8
    assert policy_look("best-of-64-routes").label == "best of 64 random routes per token"


def test_ways_of_spending_share_a_colour_and_stay_apart():
    looks = router_looks(_routers("gains", "linear", spends=("average", "exact")))
    assert list(looks) == ["gains", "gains, exact", "linear", "linear, exact"]
    assert looks["gains"].colour == looks["gains, exact"].colour != looks["linear"].colour
    assert looks["gains, exact"].style["markerfacecolor"] == "white" != looks["gains"].style["markerfacecolor"]


def test_ten_kinds_look_different():
    looks = router_looks(_routers(*(f"kind{i}" for i in range(10))))
    assert len({(look.colour, look.marker) for look in looks.values()}) == 10


def test_every_router_and_budget_is_a_point(compared):
    axes = draw_chart(loss_by_cost(compared[2], "pooled")).axes
    assert len(axes) == 4
    routers = [drawn for drawn in axes[0].containers if drawn.get_label().startswith("router")]
    assert sum(len(drawn.lines[0].get_xdata()) for drawn in routers) == 3 * 5
    assert len(axes[2].lines) < len(axes[0].lines)


def test_a_router_keeps_its_colour_where_another_has_no_costs(compared):
    """Of linear routers no FLOPs are known here."""

    def colours(axes):
        return {one.get_label(): one.lines[0].get_color() for one in axes.containers}

    time, flops = map(colours, draw_chart(loss_by_cost(compared[2], "pooled")).axes[:2])
    assert "router (linear)" in time.keys() - flops.keys()
    assert flops.items() <= time.items()


def test_agreement_is_drawn_at_the_ends_and_the_middle(compared):
    figure = draw_chart(agreement_over_depth(compared[2], "code", ["gains"]))
    titles = [axes.get_title(loc="left") or axes.get_title() for axes in figure.axes]
    assert titles == ["code, k = 1", "code, k = 3", "code, k = 5"]


def test_a_smaller_svg_keeps_scales_colours_and_labels():
    svg = """<svg>
    <!-- 5 --> <metadata>
    <x/> </metadata>
     <path d="M 31.181685 -0.004
    L 3 4" transform="scale(0.015625)" style="stroke-width: 0.8123"/>
     <use x="1.9999" y="-2.504" href="#m0.12345"/> <g transform="translate(3.14159 2.0) scale(0.105 -0.105)"/></svg>"""
    assert smaller(svg) == (
        '<svg><path d="M 31.18 -0 L 3 4" transform="scale(0.015625)" style="stroke-width: 0.8123"/>'
        '<use x="2" y="-2.5" href="#m0.12345"/><g transform="translate(3.14 2.0) scale(0.105 -0.105)"/></svg>'
    )


def test_titles_hold_long_names_without_their_middle():
    figure = Figure()
    axes = figure.subplots()
    name = "first" + 200 * "x" + "last"
    axes.set_title(f"{name}, k = 2")
    shorten_names(["owls", name], [figure])
    assert axes.get_title() == "firstxxxxxxxxxx…xxxxxxxxxxxlast, k = 2"


def test_the_table_of_a_figure_holds_what_it_draws(analysed, tmp_path):
    run, results = analysed
    domains = [read_tokens(run, domain)[0] for domain in results.domains]
    drawn = draw_figures(tmp_path, results, domains)
    tables = {name: pd.read_csv(svg.with_suffix(".csv"), keep_default_na=False) for name, svg in drawn.items()}
    assert all(len(table) for table in tables.values())
    chosen = tables["overview"].query("series == 'oracle'")
    rows = [row for row in results.main_nll if (row.domain, row.policy) == ("pooled", "oracle")]
    assert chosen["x"].astype(float).tolist() == [row.big_layers for row in rows]
    assert chosen["y"].astype(float).tolist() == pytest.approx([row.nll.value for row in rows], rel=1e-5)
    [low] = {row.nll.value + row.over_all_big.low - row.over_all_big.value for row in rows if row.big_layers == 2}
    assert float(chosen.query("x == '2'")["low"].item()) == pytest.approx(low, rel=1e-5)
    assert len(tables["difficulty"]) == 2 * sum(len(tokens.text) for tokens in domains)
    code = next(tokens for tokens in domains if tokens.domain == "code")
    losses = tables["losses_of_text"].query("series == 'oracle'")["y"].astype(float)
    assert losses.tolist() == pytest.approx(code.oracle(results.searched_budget).nll_T[: len(losses)], rel=1e-5)
    [layer] = [row for row in results.layer_use if (row.domain, row.policy, row.big_layers) == ("code", "oracle", 3)]
    cells = tables["layer_use_by_position"].query("panel == 'code, oracle, k = 3'")
    for column, name in (("y", "value"), ("low", "low"), ("high", "high")):
        shares = [getattr(share, name) - 0.5 for share_P in layer.share_by_layer_and_position for share in share_P]
        assert cells[column].astype(float).tolist() == pytest.approx(shares, abs=1e-5)
    routes = domains[0].oracle(results.searched_budget).routes_TL[:20]
    strip = tables["routes"].query(f"panel == '{results.domains[0]}, oracle, k = 2' and series == 'layer 4, branch'")
    assert strip["y"].astype(int).tolist() == routes[:, 4].tolist()
    assert strip["note"].iloc[0] == one_line(domains[0].text[0])


def test_the_cheapest_policy_has_the_name_that_the_run_gives_it(analysed):
    results = replace(analysed[1], model=analysed[1].model | {"branches": ["skip", "big"]})
    for named, label in ((analysed[1], "all small"), (results, "all skipped")):
        [axes] = draw_chart(nll_by_budget(named, ["code"], [])).axes
        assert label in axes.get_legend_handles_labels()[1]
