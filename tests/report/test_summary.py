import json

import pytest

from duollm.records.numbers import with_interval
from duollm.report.summary import gains_at, print_summary, summary_budget
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
    assert summary_budget(results) == 2, "a third of six layers"
    named = dict(gains_at(results, 2))
    noise = pick(results.selection_noise, domain="pooled", big_layers=2, context="shared")
    assert named["oracle"] == noise.gain
    assert named["oracle of labels drawn from the model"] == noise.gain_drawn
    router = pick(results.comparison, domain="pooled", kind="linear", spend="average", big_layers=2)
    assert named["router linear"] == router.fair_gain
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in shown.splitlines() if "│" in line]
    assert [[name, with_interval(gain)] for name, gain in named.items()] == [row for row in cells if "[" in row[-1]]
