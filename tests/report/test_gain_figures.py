"""Figures of what the oracle's gain is worth."""

from dataclasses import replace

import pytest

from duollm.analysis.analyse import analyse
from duollm.analysis.results import NoiseRow, TriesRow
from duollm.records.bootstrap import Estimate
from duollm.report.chart import draw_chart
from duollm.report.gain_figures import (
    gain_by_depth,
    gains_by_budget,
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
