import pytest

from duollm.report.comparison import columns_in_use, comparison_lines, estimate_cell
from picking import pick


@pytest.fixture
def results(compared):
    return compared[2]


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
    row = pick(results.comparison, domain="prose", policy="gains_k3")
    assert line.cells["nll"].value == f"{row.nll.value:.3f}"
    assert line.cells["nll"].interval == f"[{row.nll.low:.3f}, {row.nll.high:.3f}]"
    assert line.cells["gain over static"].value == f"+{row.gain_at_spent.value:.4f}"
    assert line.cells["FLOPs"].value == f"{1310 / 1600:.3f}"
    assert str(line.cells["time"]) == "0.880 (router 4.5%)"
    assert str(line.cells["share of big"]) == "50.0% (+0.0 points)"
    assert estimate_cell(None) is None
