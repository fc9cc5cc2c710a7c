import pytest

from duollm.analysis.results import analyse
from duollm.report.decomposition import (
    ceiling_budget,
    decomposition_sentences,
    gain_by_depth,
    parts_by_budget,
    shown_decomposition,
)
from duollm.report.page import write_report
from synthetic_ceiling import write_ceiling
from synthetic_run import Plan, write_run

MINUS = "\N{MINUS SIGN}"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = tmp_path_factory.mktemp("decomposition")
    write_ceiling(run, write_run(run, Plan(router_budgets=())), (2, 3))
    return run


@pytest.fixture(scope="module")
def results(run):
    return analyse(run, 100)


def _measured(**parts):
    """Results with one row; every part is given as (value, low, high)."""
    row = {"domain": "prose", "context": "shared", "big_layers": 4}
    everything = {
        "total": (0.4, 0.35, 0.45),
        "predictable": (0.02, 0.01, 0.03),
        "noise": (0.38, 0.3, 0.4),
        "rest": (0.0, -0.1, 0.1),
        "shuffled": (0.0, -0.01, 0.01),
    } | parts
    for name, (value, low, high) in everything.items():
        row |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return {"decomposition": [row]}


def test_bars_hold_the_results(results):
    axes = parts_by_budget(results, ["code", "prose"]).axes[1]
    rows = [row for row in results["decomposition"] if row["domain"] == "prose"]
    bars = {bar.get_label(): [patch.get_height() for patch in bar] for bar in axes.containers if len(bar) == len(rows)}
    assert bars["predictable here"] == [row["predictable"] for row in rows]
    assert bars["selection noise"] == [row["noise"] for row in rows]
    assert bars["rest"] == [row["rest"] for row in rows]


def test_lines_over_depth_hold_the_results(results):
    axes = gain_by_depth(results, ["code", "prose"], 3).axes[0]
    rows = [row for row in results["ceiling"] if (row["domain"], row["big_layers"]) == ("code", 3)]
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
    for spend, label in (("average", "k on average"), ("exact", "k on every token")):
        assert lines[label] == [row["gain"] for row in rows if row["spend"] == spend and not row["shuffled"]]


@pytest.mark.parametrize(("wanted", "shown"), [(3, 3), (6, 3), (1, 2)])
def test_the_budget_shown_was_measured(results, wanted, shown):
    assert ceiling_budget(results, wanted) == shown


@pytest.mark.parametrize(
    ("parts", "said"),
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
def test_the_sentences_say_no_more_than_the_intervals(parts, said):
    assert said in decomposition_sentences(_measured(**parts), "prose", 4)


def test_nothing_is_said_where_nothing_was_measured():
    assert decomposition_sentences({"decomposition": []}, "prose", 4) is None
    assert decomposition_sentences(_measured(), "prose", 5) is None
    assert ceiling_budget({"ceiling": []}, 4) == 4


def test_one_context_is_shown():
    rows = [{"context": context} for context in ("reference", "reference", "shared")]
    assert shown_decomposition({"decomposition": rows}) == rows[:2]


def test_the_page_shows_both_figures_and_the_sentences(run, results):
    page = write_report(run).read_text(encoding="utf-8")
    for figure in ("decomposition", "ceiling_by_depth"):
        assert f'<figure id="{figure}">' in page
        assert (run / "figures" / f"{figure}.svg").exists()
    assert "How much of it can be predicted?" in page
