import json
from dataclasses import replace

import pytest

from duollm.analysis.results import read_results
from duollm.errors import UserError


def test_the_headline_is_all_domains_pooled_or_the_only_one(compared):
    results = compared[2]
    assert (results.headline, results.domains, results.num_layers) == ("pooled", ["code", "prose"], 6)
    assert replace(results, data={"code": results.data["code"]}).headline == "code"


def test_the_shown_budget_is_the_measured_one_nearest_to_a_third_of_the_layers(compared):
    results = compared[2]
    assert results.searched_budget == results.shown_budget(results.nll) == 2
    assert results.shown_budget(row for row in results.nll if row.big_layers not in (1, 2, 3)) == 0
    assert results.shown_budget([]) == 2


def test_the_fair_gain_is_that_at_what_was_spent_where_it_is_known(compared):
    row = next(row for row in compared[2].comparison if row.kind)
    assert row.fair_gain is row.gain_at_spent
    assert replace(row, gain_at_spent=None).fair_gain is row.gain_over_static


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{}", r"not the results of this version of duollm \(provenance: .*run `duollm report` on the run again"),
        ("{", "not readable as JSON"),
        ("[" * 100_000, "not readable as JSON"),
        (None, "no such file; is .* a run folder of duollm"),
    ],
    ids=["foreign", "damaged", "deep", "missing"],
)
def test_what_is_not_the_results_of_a_run_is_refused_in_a_line(tmp_path, content, complaint):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match=r"results\.json: " + complaint) as error:
        read_results(tmp_path)
    assert "\n" not in str(error.value)


def test_results_of_an_older_form_are_refused_by_their_first_row(compared, tmp_path):
    results = json.loads((compared[0] / "results.json").read_text())
    results["nll"][0]["nll"] = 3.2
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match=r"\(nll\.0\.nll: "):
        read_results(tmp_path)


@pytest.mark.parametrize("lost", [{"data": {}}, {"model": {}}, {"model": {"num_layers": "three"}}], ids=str)
def test_results_without_data_or_model_are_refused(compared, tmp_path, lost):
    results = json.loads((compared[0] / "results.json").read_text())
    (tmp_path / "results.json").write_text(json.dumps(results | lost))
    with pytest.raises(UserError, match=r"results\.json: names no data, or no model; run `duollm report`"):
        read_results(tmp_path)
