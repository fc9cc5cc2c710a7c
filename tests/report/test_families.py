from dataclasses import replace

import pytest

from duollm.analysis.results import FamilyRow
from duollm.cli import main
from duollm.records.bootstrap import Estimate
from duollm.report.families import FAMILY_LEGEND, family_table


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
