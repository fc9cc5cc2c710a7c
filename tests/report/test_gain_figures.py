"""Figures of what the oracle's gain is worth."""

from dataclasses import replace

import pandas as pd
import pytest

from duollm.analysis.analyse import analyse
from duollm.analysis.results import NoiseRow, TriesRow
from duollm.records.bootstrap import Estimate
from duollm.report.chart import draw_chart, rows
from duollm.report.gain_figures import (
    gain_by_depth,
    gains_by_budget,
    gains_by_class,
    gains_by_context,
    gains_by_tries,
    of_first_context,
    parts_by_budget,
)
from synthetic_ceiling import write_ceiling
from synthetic_run import Plan, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = tmp_path_factory.mktemp("gains")
    write_ceiling(run, write_run(run, Plan(router_budgets=())), (2, 3))
    return run


@pytest.fixture(scope="module")
def results(run):
    return analyse(run, 100)


def test_lines_of_gains_hold_the_results(results):
    axes = draw_chart(gains_by_budget(results, ["code", "prose"])).axes[1]
    rows = [row for row in results.selection_noise if row.domain == "prose"]
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
    assert lines["oracle, true labels"] == [row.gain.value for row in rows]
    assert lines["the same search, drawn labels"] == [row.gain_drawn.value for row in rows]
    assert lines["the picks of drawn labels on a second draw"] == [row.second_draw.value for row in rows]


def _table(chart):
    """Return a figure's CSV, x and numbers as floats."""
    header, *lines = rows(chart)
    table = pd.DataFrame(lines, columns=header)
    return table.assign(**{name: pd.to_numeric(table[name]) for name in ("x", "y", "low", "high")})


def _agree(table, estimates):
    """Whether the rows of a series are these estimates by x."""
    assert list(table["x"]) == list(estimates)
    for name, part in (("y", "value"), ("low", "low"), ("high", "high")):
        assert list(table[name]) == pytest.approx([getattr(one, part) for one in estimates.values()], rel=1e-5)


def test_contexts_stand_side_by_side_with_their_own_gains(results):
    table = _table(gains_by_context(results, ["code", "prose"]))
    compared = [row for row in results.comparison if row.domain == "prose"]
    noise = [row for row in results.selection_noise if row.domain == "prose"]
    expected = {
        ("context shared", "oracle, true labels"): {row.big_layers: row.gain for row in noise},
        ("context shared", "the same search, drawn labels"): {row.big_layers: row.gain_drawn for row in noise},
    }
    for context, policy, panel, series in (
        ("shared", "executed-together", "context shared", "oracle, executed together"),
        ("committed", "oracle", "context committed", "oracle, true labels"),
        ("shared", "executed-together", "picks executed together", "picks of context shared"),
        ("committed", "executed-together", "picks executed together", "picks of context committed"),
    ):
        found = [row for row in compared if (row.context, row.policy) == (context, policy) and row.gain_over_static]
        expected[panel, series] = {row.big_layers: row.gain_over_static for row in found}
    shown = {key: own for key, own in table[table.series != "static"].groupby(["panel", "series"])}
    assert {key for key in shown if key[0].startswith("prose")} == {(f"prose, {key[0]}", key[1]) for key in expected}
    for (panel, series), estimates in expected.items():
        assert estimates
        _agree(shown[f"prose, {panel}", series], estimates)


def test_contexts_share_their_scales(results):
    axes = draw_chart(gains_by_context(results, ["code", "prose"])).axes
    for row in (axes[:3], axes[3:]):
        assert len({(one.get_xlim(), one.get_ylim()) for one in row}) == 1


def test_one_context_has_nothing_to_stand_beside(results):
    one = [row for row in results.nll if row.context in (None, "shared")]
    assert gains_by_context(replace(results, nll=one), ["code", "prose"]) is None


def test_classes_stand_in_the_order_of_their_frequency_without_rare_ones(results):
    classes = results.difficulty_by_class
    [rare, *_] = [row for row in classes if (row.domain, row.kind) == ("code", "python")]
    classes = [replace(row, tokens=19) if row == rare else row for row in classes]
    table = _table(gains_by_class(replace(results, difficulty_by_class=classes)))
    everything = next(row for row in classes if (row.domain, row.kind) == ("code", "all"))
    mine = [row for row in classes if (row.domain, row.kind) == ("code", "python") and row.tokens >= 20]
    shown = [everything, *sorted(mine, key=lambda row: -row.tokens)]
    assert len(shown) > 2
    for panel, series, quantity in (
        ("loss", "loss under all small", "nll_small"),
        ("gain", "oracle, true labels", "gain"),
        ("gain", "the same search, drawn labels", "gain_drawn"),
        ("gain", "predicted, k on every token", "gain_predicted"),
    ):
        own = table[(table.panel == f"code, by Python's tokenizer: {panel}") & (table.series == series)]
        assert list(own.note) == [f"{row.name}, n = {row.tokens}" for row in shown]
        _agree(own, {place: getattr(row, quantity) for place, row in enumerate(shown)})


def test_line_starts_can_be_found_among_the_classes(results):
    prose = [row for row in results.difficulty_by_class if row.domain == "prose"]
    axes = draw_chart(gains_by_class(replace(results, difficulty_by_class=prose))).axes[1]
    names = [text.get_text() for text in axes.get_yticklabels() if text.get_fontweight() == "bold"]
    assert [name.partition(",")[0] for name in names] == ["line start"]


def test_gains_of_classes_that_were_not_measured_are_left_out(results):
    bare = [replace(row, gain_predicted=None, gain_drawn=None) for row in results.difficulty_by_class]
    chart = gains_by_class(replace(results, difficulty_by_class=bare))
    assert {series.look.label for _, gains in chart.grid for series in gains.series} == {"oracle, true labels"}
    assert gains_by_class(replace(results, difficulty_by_class=[])) is None


def test_gains_by_tries_hold_the_results(results):
    def gains(start):
        return [Estimate(start + place, start, start + 3) for place in range(3)]

    rows = [
        TriesRow("pooled", k, [1, 2, 4], gains(k), gains(k + 1), gains(k + 2), gains(k + 3), gains(k + 4), [1], [], [])
        for k in (2, 3)
    ]
    chart = gains_by_tries(replace(results, tries=[*rows, replace(rows[0], domain="code")]), "pooled", [3])
    [axes] = draw_chart(chart).axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines["oracle, true labels"].get_xdata()) == [1, 2, 4]
    assert list(lines["oracle, true labels"].get_ydata()) == [3, 4, 5]
    assert list(lines["a search by the expected loss of drawn labels"].get_ydata()) == [7, 8, 9]


def test_bars_hold_the_results(results):
    axes = draw_chart(parts_by_budget(results, ["code", "prose"])).axes[1]
    rows = [row for row in results.decomposition if row.domain == "prose"]
    bars = {bar.get_label(): [patch.get_height() for patch in bar] for bar in axes.containers if len(bar) == len(rows)}
    assert bars["predicted, k on every token"] == [row.predictable.value for row in rows]
    assert bars["selection noise"] == [row.noise.value for row in rows]
    assert bars["rest"] == [row.rest.value for row in rows]


def test_lines_over_depth_hold_the_results(results):
    axes = draw_chart(gain_by_depth(results, ["code", "prose"], 3)).axes[0]
    rows = [row for row in results.ceiling if (row.domain, row.big_layers) == ("code", 3)]
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
    for spend, label in (("average", "k on average"), ("exact", "k on every token")):
        assert lines[label] == [row.gain.value for row in rows if row.spend == spend and not row.shuffled]


def test_one_context_is_shown():
    row = NoiseRow("prose", "shared", 4, *[Estimate(0.4, 0.3, 0.5)] * 4)
    rows = [replace(row, context=context) for context in ("reference", "reference", "shared")]
    assert of_first_context(rows) == rows[:2]
