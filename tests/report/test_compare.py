import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from duollm.analysis.results import FamilyRow
from duollm.cli import main
from duollm.errors import UserError
from duollm.records.bootstrap import Estimate
from duollm.report.compare import FAMILY_LEGEND, comparison_table, family_table, print_comparison
from picking import pick

ROUTER = {"policy": "gains_k2"}
ORACLE = {"policy": "oracle", "context": "shared", "big_layers": 2}


@pytest.fixture
def results(compared):
    return compared[2]


def test_one_run_as_a_table(compared, capsys):
    assert main(["compare", str(compared[0]), "--budget", "2"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("big layers per token") == 1
    for part in (
        "2 big layers per token, pooled",
        "gains, exact",
        "oracle, committed",
        "share of big",
        "FLOPs",
        "time",
    ):
        assert part in printed
    assert "of ceiling" not in printed


def test_several_runs_as_markdown(compared, tmp_path, capsys):
    other = shutil.copytree(compared[0], tmp_path / "other")
    print_comparison([compared[0], other], [2, 3], "prose", "markdown")
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("###")] == [
        "### 2 big layers per token, prose",
        "### 3 big layers per token, prose",
    ]
    table = [line for line in lines if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert {line.split(" | ")[0] for line in table[2:] if "gains" in line} == {"| compared", "| other"}


def test_json_is_the_rows_of_the_results(compared, capsys):
    run, _, results = compared
    print_comparison([run], [3], None, "json")
    rows = json.loads(capsys.readouterr().out)
    assert {row["big_layers"] for row in rows} == {0, 3, 6}
    first = {key: value for key, value in rows[0].items() if key != "run"}
    assert first in [asdict(row) for row in results.comparison]
    assert {row["domain"] for row in rows} == {"pooled"}


def test_runs_of_the_same_name_are_told_apart(compared, tmp_path, capsys):
    other = shutil.copytree(compared[0], tmp_path / "compared")
    print_comparison([compared[0], other], [2], None, "json")
    assert len({row["run"] for row in json.loads(capsys.readouterr().out)}) == 2


@pytest.mark.parametrize(
    ("budgets", "domain", "message"),
    [([6], None, "6 big layers were not compared; there are 1, 2, 3, 4, 5"), (None, "pros", "did you mean 'prose'")],
    ids=["budget", "domain"],
)
def test_what_was_not_compared(compared, budgets, domain, message):
    with pytest.raises(UserError, match=message):
        print_comparison([compared[0]], budgets, domain, "table")


def test_results_of_an_older_version(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(UserError, match=r"not the results of this version of duollm .* run `duollm report`"):
        print_comparison([tmp_path], None, None, "table")


def test_no_torch():
    code = "import sys, duollm.report.compare; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_lines_stand_in_order_with_routers_by_gain(results):
    names = [row["policy"] for row in comparison_table(results, "pooled", 2)]
    assert names[:4] == ["all small", "random patterns", "best of 100 patterns", "static"]
    assert set(names[4:6]) == {"gains", "gains, exact"}
    assert names[6] == "linear"
    assert names.index("oracle, shared") < names.index("oracle, committed") < names.index("all big")


def test_cells_hold_the_numbers_of_the_results(results):
    [cells] = [row for row in comparison_table(results, "prose", 3) if row["policy"] == "gains"]
    row = pick(results.comparison, domain="prose", policy="gains_k3")
    assert cells["nll"] == f"{row.nll.value:.3f} [{row.nll.low:.3f}, {row.nll.high:.3f}]"
    assert cells["gain over static"].split(" ")[0] == f"+{row.gain_at_spent.value:.4f}"
    assert cells["FLOPs"].split(" ")[0] == f"{1310 / 1600:.3f}"
    assert cells["time"] == "0.880 (router 4.5%)"
    assert cells["share of big"] == "50.0% (+0.0 points)"


def test_a_missed_budget_is_marked(results):
    rows = [replace(row, big_share=0.4, within_budget=False) for row in results.comparison if row.kind]
    [cells] = [
        row for row in comparison_table(replace(results, comparison=rows), "prose", 3) if row["policy"] == "gains"
    ]
    assert cells["share of big"] == "40.0%! (\u221210.0 points)"


def test_a_share_of_the_oracles_gain_is_the_ratio_of_two_numbers_of_the_table(results):
    rows = {row["policy"]: row for row in comparison_table(results, "prose", 2)}
    router, oracle = (pick(results.comparison, domain="prose", **name) for name in (ROUTER, ORACLE))
    share = router.of_oracle
    assert share.value == pytest.approx(router.fair_gain.value / oracle.gain_over_static.value)
    shown = f"{share.value:.1%} [{share.low:.1%}, {share.high:.1%}]".replace("-", "\u2212")
    assert rows["gains"]["of oracle's gain"] == shown
    assert {name for name, row in rows.items() if row["of oracle's gain"]} == {"gains", "gains, exact", "linear"}
    assert not any(row["of ceiling"] for row in rows.values())


def row(router, area, best_p, gain_p=(0.01, 0.2)):
    estimate = Estimate(area, area - 0.01, area + 0.01)
    return FamilyRow("pooled", router, [2, 4], [estimate] * 2, list(gain_p), estimate, 0.0123, best_p)


def test_a_row_per_router_by_area(compared):
    rows = [row("low", 0.01, 0.05), replace(row("part", 0.0, None), area=None, area_p=None), row("high", 0.02, 1.0)]
    elsewhere = [replace(row("high", 0.1, 1.0), domain="prose")]
    results = replace(compared[2], families=[*rows, *elsewhere])
    high, low, part = family_table(results, "pooled")
    names = ("router", "area [95 %]", "p", "beats static at", "may be best")
    assert high == dict(zip(names, ("high", "0.0200 [0.0100, 0.0300]", "0.012", "2", "yes"), strict=True))
    assert low["may be best"] == "no"
    assert part == dict(zip(names, ("part", "not measured", "", "2", ""), strict=True))
    [idle] = family_table(replace(results, families=[row("idle", 0, 1, (1.0, 1.0))]), "pooled")
    assert idle["beats static at"] == "none"


def test_compare_shows_all_budgets_unless_some_are_asked_for(compared, capsys):
    families = [one for one in compared[2].families if one.domain == "pooled"]
    assert {one.router for one in families} == {"gains", "gains, exact", "linear"}
    main(["compare", str(compared[0]), "--markdown"])
    printed = capsys.readouterr().out
    assert FAMILY_LEGEND in printed
    [_, table] = printed.split("### over all budgets, pooled")
    assert [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| ")][2:] == [
        f"| {one.router}" for one in sorted(families, key=lambda one: -one.area.value)
    ]
    main(["compare", str(compared[0]), "--budget", "2"])
    assert FAMILY_LEGEND not in capsys.readouterr().out


@pytest.mark.parametrize("router", ["gains", "gains, exact"])
def test_a_router_that_takes_the_oracles_route_on_half_of_the_tokens_beats_static_at_every_budget(compared, router):
    [family] = [one for one in compared[2].families if (one.domain, one.router) == ("pooled", router)]
    assert family.beats_static == family.big_layers == [1, 2, 3, 4, 5]
    assert family.area.low > 0
