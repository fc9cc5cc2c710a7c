import pytest

from duollm.analysis.comparison import shown_routers
from duollm.report.comparison import as_text, columns_in_use, compared, comparison_lines, spend_table
from duollm.report.comparison_figures import agreement_over_depth, loss_by_cost


@pytest.fixture
def results(compared):
    return compared[2]


def test_the_papers_router_is_shown_first_and_then_the_best_of_other_kinds():
    gains = {("linear", "average"): 0.1, ("gains", "average"): 0.2, ("gains", "exact"): 0.3, ("random", "exact"): 0.0}
    gains |= {("linear", "exact"): 0.25}
    rows = [
        {"domain": "a", "kind": kind, "spend": spend, "policy": "", "gain_over_static": gain, "gain_at_spent": None}
        for (kind, spend), gain in gains.items()
    ]
    assert shown_routers(rows, "a") == ["linear", "gains, exact", "random, exact"]
    assert shown_routers(rows, "a", most=2) == ["linear", "gains, exact"]
    assert shown_routers(rows[1:4], "a")[0] == "gains"
    assert shown_routers([], "a") == []


def test_lines_stand_in_order_with_routers_by_gain(results):
    lines = comparison_lines(results, "pooled", 2)
    names = [line.name for line in lines]
    assert names[:4] == ["all small", "random patterns", "best of 100 patterns", "static"]
    assert set(names[4:6]) == {"gains", "gains, exact"}
    assert names[6] == "linear"
    assert [line.trained for line in lines].count(True) == 3
    assert names.index("oracle, shared") < names.index("oracle, committed") < names.index("all big")
    assert "of ceiling" not in columns_in_use(lines)


def test_cells_hold_the_numbers_of_the_results(results):
    line = next(line for line in comparison_lines(results, "prose", 3) if line.name == "gains")
    row = next(row for row in results["comparison"] if (row["domain"], row["policy"]) == ("prose", "gains_k3"))
    assert line.cells["nll"].value == f"{row['nll']:.3f}"
    assert line.cells["gain over static"].value == f"+{row['gain_at_spent']:.4f}"
    assert line.cells["gain over static"].mark == "better"
    assert line.cells["FLOPs"].value == f"{1310 / 1600:.3f}"
    assert as_text(line.cells["time"]) == "0.880 (router 4.5%)"
    assert as_text(line.cells["share of big"]) == "50.0% (+0.0 points)"
    assert as_text(None) == ""


def test_spending_is_compared_for_kinds_with_both_ways(results):
    table = spend_table(results, "pooled")
    assert table.budgets == compared(results) == [1, 2, 3, 4, 5]
    assert [kind for kind, _ in table.lines] == ["gains"]


def test_a_higher_loss_with_exact_spending_is_marked_as_worse():
    row = {"domain": "a", "kind": "gains", "big_layers": 2, "exact_minus_average": 0.2}
    row |= {"exact_minus_average_low": 0.1, "exact_minus_average_high": 0.3}
    [(_, [cell])] = spend_table({"spend": [row]}, "a").lines
    assert (cell.value, cell.mark) == ("+0.2000", "worse")


def test_every_router_and_budget_is_a_point(results):
    axes = loss_by_cost(results, "pooled").axes
    assert len(axes) == 4
    points = sum(len(line.get_xdata()) for container in axes[0].containers for line in [container.lines[0]])
    assert points == 3 * 5
    assert len(axes[2].lines) < len(axes[0].lines)


def test_agreement_is_drawn_at_the_ends_and_the_middle(results):
    titles = [
        axes.get_title(loc="left") or axes.get_title() for axes in agreement_over_depth(results, "code", ["gains"]).axes
    ]
    assert titles == ["code, k = 1", "code, k = 3", "code, k = 5"]
