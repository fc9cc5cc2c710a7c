"""The curve over scale: shares from hand-made rows, and the docs against the rows that they cite."""

import json

import pytest

import luck_by_scale
from duollm.files import write_json
from duollm.records.bootstrap import Estimate
from duollm.report.chart import write_csv


def estimate(value, low, high):
    return {"value": value, "low": low, "high": high}


def test_shares_have_the_interval_of_their_part():
    noise = {"gain": estimate(2.0, 1.0, 3.0), "gain_beyond_drawn": estimate(0.1, 0.05, 0.2)}
    here = {"domain": "prose", "big_layers": 6}
    ceiling = {"chosen": True, "shuffled": False, "spend": "average", "gain": estimate(0.02, -0.01, 0.04)}
    control = ceiling | {"shuffled": True, "gain": estimate(9, 9, 9)}
    results = {
        "selection_noise": [
            here | noise | {"context": "reference", "gain": None},
            here | noise | {"context": "shared"},
        ],
        "ceiling": [here | control, here | ceiling],
    }
    found = luck_by_scale.shares(results, "prose", 6)
    assert found.gain == Estimate(2.0, 1.0, 3.0)
    assert (found.drawn.value, found.drawn.low, found.drawn.high) == pytest.approx((0.95, 0.9, 0.975))
    assert (found.predicted.value, found.predicted.low, found.predicted.high) == pytest.approx((0.01, -0.005, 0.02))
    assert luck_by_scale.shares(results | {"ceiling": []}, "prose", 6).predicted is None


def test_the_page_shows_what_the_committed_rows_say(tmp_path):
    found = luck_by_scale.measured()
    page = (luck_by_scale.DOCS / "finding.md").read_text(encoding="utf-8")
    assert [line for line in luck_by_scale.table(found) if line not in page] == []
    write_csv(luck_by_scale.chart(found), tmp_path / "now.csv")
    assert (tmp_path / "now.csv").read_bytes() == (luck_by_scale.DOCS / "finding" / "luck_by_scale.csv").read_bytes()


def test_a_run_is_kept_without_what_the_page_does_not_cite(tmp_path, monkeypatch):
    monkeypatch.setattr(luck_by_scale, "DOCS", tmp_path)
    (tmp_path / "finding").mkdir()
    cited = {key: [1] for key in luck_by_scale.KEPT} | {"units": []}
    provenance = {"version": "0.1.0", "commit": "abc", "seed": 0, "machine": {"platform": "x", "cores": 2}}
    rest = {"timing": {}, "provenance": provenance | {"command": ["/somewhere/duollm"]}, "nll": [{"nll": 1 / 3}]}
    write_json(tmp_path / "results.json", cited | rest)
    path = luck_by_scale.keep(tmp_path, "small", "duollm study")
    kept = json.loads(path.read_text(encoding="utf-8"))
    assert kept.keys() == {"command", *luck_by_scale.KEPT, "provenance"} - {"units"}
    assert kept["provenance"] == provenance | {"machine": {"cores": 2}}
    assert kept["nll"] == [{"nll": 0.333333}]
