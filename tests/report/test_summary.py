import json

import pytest

from duollm.records.bootstrap import tenths, with_interval
from duollm.report.summary import gains_at, print_frontier, print_routers, print_summary
from picking import pick


@pytest.fixture
def shown(compared, capsys):
    run = compared[0]
    for name, seconds in (("data", 0.01), ("oracle", 61.5), ("report", 8.5)):
        (run / "stages").mkdir(exist_ok=True)
        (run / "stages" / f"{name}.json").write_text(json.dumps({"seconds": seconds}))
    print_summary(run, ["data", "oracle", "report"])
    return capsys.readouterr().out


def test_times_of_stages_and_where_to_look_next(compared, shown):
    seconds = {row[1]: row[3] for row in map(str.split, shown.splitlines()) if row[:1] == ["│"] and len(row) == 5}
    assert seconds == {"oracle": "61.5", "report": "8.5", "all": "70"}
    assert shown.endswith(f"Next: duollm report {compared[0]} --open\n      duollm compare {compared[0]}\n")


def test_gains_are_those_of_the_results(compared, shown):
    results = compared[2]
    assert results.shown_budget(results.selection_noise) == 2, "a third of six layers"
    named = {name: gain for name, gain, _ in gains_at(results, 2)}
    noise = pick(results.selection_noise, domain="pooled", big_layers=2, context="shared")
    assert named["choosing in hindsight (oracle)"] == noise.gain
    assert named["the same search on made-up labels"] == noise.gain_drawn
    router = pick(results.comparison, domain="pooled", kind="linear", spend="average", big_layers=2)
    assert named["router (linear)"] == router.fair_gain
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in shown.splitlines() if "│" in line]
    shares = {name: with_interval(share, tenths) if share else "" for name, _, share in gains_at(results, 2)}
    assert shares["router (linear)"] == with_interval(router.of_oracle, tenths)
    expected = [[name, with_interval(gain), shares[name]] for name, gain in named.items()]
    assert expected == [row for row in cells if row[0] in named and "[" in row[1]]


def cells_of(shown):
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in shown.splitlines() if line[:1] == "│"]


def test_the_frontier_is_a_line_per_policy(compared, capsys):
    results = compared[2]
    print_frontier(results)
    rows = {name: cells for name, *cells in cells_of(capsys.readouterr().out)}
    assert {"hindsight (oracle)", "fixed pattern", "random patterns, mean", "router (linear)"} <= set(rows)
    losses = {
        row.big_layers: row.nll.value for row in results.main_nll if (row.domain, row.policy) == ("pooled", "oracle")
    }
    best = min(losses, key=lambda k: losses[k])
    bars, at_budget, lowest = rows["hindsight (oracle)"]
    assert (at_budget, lowest) == (f"{losses[2]:.3f}", f"{losses[best]:.3f} at {best}")
    assert len(bars) == 7
    assert bars[best] == "▁", "the lowest loss of all is the oracle's"


def test_a_training_says_what_its_routers_spend(tmp_path, capsys):
    for k, share in ((1, 0.25), (2, 0.5)):
        facts = {"kind": "linear", "big_layers": k, "budget": share, "calibrated_share": share + 0.01}
        (tmp_path / "routers" / f"linear_k{k}").mkdir(parents=True)
        (tmp_path / "routers" / f"linear_k{k}" / "router.json").write_text(json.dumps(facts))
    print_routers(tmp_path, ["linear_k1", "linear_k2"], "linear")
    shown = capsys.readouterr().out
    assert cells_of(shown) == [["linear_k1", "0.25", "0.26"], ["linear_k2", "0.5", "0.51"]]
    assert "training loss" not in shown
    steps = [{"training": name, "nll": nll} for name in ("linear", "other") for nll in (4.0, 3.0, 2.0)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    print_routers(tmp_path, ["linear_k1"], "linear")
    assert capsys.readouterr().out.endswith("training loss █▅▁ 4.000 .. 2.000\n")
