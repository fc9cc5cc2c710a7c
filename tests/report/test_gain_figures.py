"""Figures and sentences on what the oracle's gain is worth."""

from dataclasses import replace

import pytest

from duollm.analysis.analyse import analyse
from duollm.analysis.results import DecompositionRow, NoiseRow
from duollm.records.bootstrap import Estimate
from duollm.report.gain_figures import (
    ceiling_budget,
    decomposition_sentences,
    gain_by_depth,
    gains_by_budget,
    noise_sentences,
    of_first_context,
    parts_by_budget,
)
from duollm.report.page import write_report
from synthetic_ceiling import write_ceiling
from synthetic_run import Plan, write_run

MINUS = "\N{MINUS SIGN}"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = tmp_path_factory.mktemp("gains")
    write_ceiling(run, write_run(run, Plan(router_budgets=())), (2, 3))
    return run


@pytest.fixture(scope="module")
def results(run):
    return analyse(run, 100)


def _row(kind, usual, changed):
    """A row of k = 4, each of its estimates given as (value, low, high)."""
    return kind("prose", "shared", 4, **{name: Estimate(*ends) for name, ends in (usual | changed).items()})


@pytest.fixture
def noise(results):
    """Results in which only one row of selection noise was measured."""
    usual = {
        "gain": (0.4, 0.35, 0.45),
        "gain_drawn": (0.4, 0.3, 0.5),
        "second_draw": (0.0, -0.1, 0.1),
        "gain_beyond_drawn": (0.0, -0.1, 0.1),
    }
    return lambda **gains: replace(results, selection_noise=[_row(NoiseRow, usual, gains)])


@pytest.fixture
def parts(results):
    """Results in which only one row of parts was measured."""
    usual = {
        "total": (0.4, 0.35, 0.45),
        "predictable": (0.02, 0.01, 0.03),
        "noise": (0.38, 0.3, 0.4),
        "rest": (0.0, -0.1, 0.1),
        "shuffled": (0.0, -0.01, 0.01),
    }
    return lambda **changed: replace(results, decomposition=[_row(DecompositionRow, usual, changed)])


def test_lines_of_gains_hold_the_results(results):
    axes = gains_by_budget(results, ["code", "prose"]).axes[1]
    rows = [row for row in results.selection_noise if row.domain == "prose"]
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
    assert lines["oracle, true labels"] == [row.gain.value for row in rows]
    assert lines["the same search, drawn labels"] == [row.gain_drawn.value for row in rows]
    assert lines["the picks of drawn labels on a second draw"] == [row.second_draw.value for row in rows]


def test_bars_hold_the_results(results):
    axes = parts_by_budget(results, ["code", "prose"]).axes[1]
    rows = [row for row in results.decomposition if row.domain == "prose"]
    bars = {bar.get_label(): [patch.get_height() for patch in bar] for bar in axes.containers if len(bar) == len(rows)}
    assert bars["predictable here"] == [row.predictable.value for row in rows]
    assert bars["selection noise"] == [row.noise.value for row in rows]
    assert bars["rest"] == [row.rest.value for row in rows]


def test_lines_over_depth_hold_the_results(results):
    axes = gain_by_depth(results, ["code", "prose"], 3).axes[0]
    rows = [row for row in results.ceiling if (row.domain, row.big_layers) == ("code", 3)]
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
    for spend, label in (("average", "k on average"), ("exact", "k on every token")):
        assert lines[label] == [row.gain.value for row in rows if row.spend == spend and not row.shuffled]


@pytest.mark.parametrize(("wanted", "shown"), [(3, 3), (6, 3), (1, 2)])
def test_the_budget_shown_was_measured(results, wanted, shown):
    assert ceiling_budget(results, wanted) == shown


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, "without the label reaches 0.020 [0.010, 0.030]; a peek at a drawn label alone buys 0.380 [0.300, 0.400]"),
        ({"predictable": (0.0, -0.1, 0.1)}, f"reaches 0.000 [{MINUS}0.100, 0.100], which shows no gain"),
        ({"predictable": (-0.1, -0.2, -0.05)}, "it is 0.100 [0.050, 0.200] worse than static"),
        ({}, f"What they leave, 0.000 [{MINUS}0.100, 0.100], does not differ from nothing."),
        ({"rest": (0.1, 0.05, 0.2)}, "That leaves 0.100 [0.050, 0.200] unexplained."),
        ({"rest": (-0.1, -0.2, -0.05)}, "exceed it by 0.100 [0.050, 0.200], so none of it is left"),
        ({}, f"fitted to gains of other tokens, shows no gain: 0.000 [{MINUS}0.010, 0.010]."),
        ({"shuffled": (0.02, 0.01, 0.03)}, "gains 0.020 [0.010, 0.030] as well: that much is a better fixed pattern"),
    ],
)
def test_the_sentences_on_the_parts_say_no_more_than_the_intervals(parts, changed, said):
    assert said in decomposition_sentences(parts(**changed), "prose", 4)


@pytest.mark.parametrize(
    ("second_draw", "said"),
    [
        ((-0.1, -0.2, -0.05), "are 0.100 [0.050, 0.200] worse than static"),
        ((0.1, 0.05, 0.2), "are 0.100 [0.050, 0.200] better than static"),
        ((0.1, -0.05, 0.2), f"by 0.100 [{MINUS}0.050, 0.200], which shows neither gain nor loss"),
    ],
)
def test_the_sentence_on_a_second_draw_says_no_more_than_the_interval(noise, second_draw, said):
    assert said in noise_sentences(noise(second_draw=second_draw), "prose", 4)


@pytest.mark.parametrize(
    ("beyond", "said"),
    [
        ((0.1, 0.05, 0.2), "buys 0.100 [0.050, 0.200] more than a drawn one"),
        ((-0.1, -0.2, -0.05), "buys 0.100 [0.050, 0.200] less than a drawn one"),
        ((0.1, -0.05, 0.2), "no difference is shown"),
    ],
)
def test_true_and_drawn_labels_are_compared_by_their_paired_difference(noise, beyond, said):
    assert said in noise_sentences(noise(gain_beyond_drawn=beyond), "prose", 4)


def test_nothing_is_said_where_nothing_was_measured(results, noise, parts):
    nothing = replace(results, selection_noise=[], decomposition=[], ceiling=[])
    assert noise_sentences(nothing, "prose", 4) is decomposition_sentences(nothing, "prose", 4) is None
    assert noise_sentences(noise(), "prose", 5) is decomposition_sentences(parts(), "prose", 5) is None
    assert ceiling_budget(nothing, 4) == 4


def test_one_context_is_shown(noise):
    [row] = noise().selection_noise
    rows = [replace(row, context=context) for context in ("reference", "reference", "shared")]
    assert of_first_context(rows) == rows[:2]


@pytest.mark.filterwarnings("ignore:Glyph:UserWarning")
def test_the_page_shows_both_figures_and_the_sentences(run, results):
    page = write_report(run).read_text(encoding="utf-8")
    for figure in ("decomposition", "ceiling_by_depth"):
        assert f'<figure id="{figure}">' in page
        assert (run / "figures" / f"{figure}.svg").exists()
    assert "How much of it can be predicted?" in page
