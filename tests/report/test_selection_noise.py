import pytest

from duollm.analysis.results import analyse
from duollm.report.selection_noise import gains_by_budget, noise_sentences, shown_noise
from synthetic_run import Plan, write_run


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    run = tmp_path_factory.mktemp("noise")
    write_run(run, Plan(router_budgets=()))
    return analyse(run, 100)


def _measured(**gains):
    """Results with one row; every gain is given as (value, low, high)."""
    row = {"domain": "prose", "context": "shared", "big_layers": 4}
    everything = {
        "gain": (0.4, 0.35, 0.45),
        "gain_drawn": (0.4, 0.3, 0.5),
        "second_draw": (0.0, -0.1, 0.1),
        "gain_beyond_drawn": (0.0, -0.1, 0.1),
    } | gains
    for name, (value, low, high) in everything.items():
        row |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return {"selection_noise": [row]}


def test_lines_hold_the_results(results):
    axes = gains_by_budget(results, ["code", "prose"]).axes[1]
    rows = [row for row in results["selection_noise"] if row["domain"] == "prose"]
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
    assert lines["oracle, true labels"] == [row["gain"] for row in rows]
    assert lines["the same search, drawn labels"] == [row["gain_drawn"] for row in rows]
    assert lines["the picks of drawn labels on a second draw"] == [row["second_draw"] for row in rows]


@pytest.mark.parametrize(
    ("second_draw", "said"),
    [
        ((-0.1, -0.2, -0.05), "are 0.100 [0.050, 0.200] worse than static"),
        ((0.1, 0.05, 0.2), "are 0.100 [0.050, 0.200] better than static"),
        ((0.1, -0.05, 0.2), "by 0.100 [\N{MINUS SIGN}0.050, 0.200], which shows neither gain nor loss"),
    ],
)
def test_the_sentence_says_no_more_than_the_interval(second_draw, said):
    assert said in noise_sentences(_measured(second_draw=second_draw), "prose", 4)


@pytest.mark.parametrize(
    ("beyond", "said"),
    [
        ((0.1, 0.05, 0.2), "buys 0.100 [0.050, 0.200] more than a drawn one"),
        ((-0.1, -0.2, -0.05), "buys 0.100 [0.050, 0.200] less than a drawn one"),
        ((0.1, -0.05, 0.2), "no difference is shown"),
    ],
)
def test_true_and_drawn_labels_are_compared_by_their_paired_difference(beyond, said):
    assert said in noise_sentences(_measured(gain_beyond_drawn=beyond), "prose", 4)


def test_nothing_is_said_where_nothing_was_measured():
    assert noise_sentences({"selection_noise": []}, "prose", 4) is None
    assert noise_sentences(_measured(), "prose", 5) is None


def test_one_context_is_shown():
    rows = [{"context": context} for context in ("reference", "reference", "shared")]
    assert shown_noise({"selection_noise": rows}) == rows[:2]
