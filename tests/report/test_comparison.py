import pytest

from duollm.report.comparison import columns_in_use, comparison_lines, estimate_cell
from picking import pick

ROUTER = {"policy": "gains_k2"}
ORACLE = {"policy": "oracle", "context": "shared", "big_layers": 2}


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


def test_a_share_of_the_oracles_gain_is_the_ratio_of_two_numbers_of_the_table(results):
    lines = {line.name: line for line in comparison_lines(results, "prose", 2)}
    router, oracle = (pick(results.comparison, domain="prose", **name) for name in (ROUTER, ORACLE))
    share = router.of_oracle
    assert share.value == pytest.approx(router.fair_gain.value / oracle.gain_over_static.value)
    cell = lines["gains"].cells["of oracle's gain"]
    assert str(cell) == f"{share.value:.1%} [{share.low:.1%}, {share.high:.1%}]".replace("-", "\u2212")
    others = {name for name, line in lines.items() if not line.trained}
    assert all(lines[name].cells[column] is None for name in others for column in ("of oracle's gain", "of ceiling"))
