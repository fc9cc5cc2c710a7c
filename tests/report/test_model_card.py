from dataclasses import replace

import pytest

from duollm.analysis.analyse import analyse
from duollm.records.bootstrap import with_interval
from duollm.report.model_card import add_results
from synthetic_run import Plan, write_run

CARD = "---\nlicense: mit\n---\n# A duo\n"


@pytest.fixture
def card(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(CARD)
    return path


def test_every_number_of_the_table_is_the_pooled_loss(card, tmp_path):
    write_run(tmp_path / "run")
    results = analyse(tmp_path / "run", 100)
    add_results(card, results)
    text = card.read_text()
    assert text.startswith(CARD)
    shown = {"static", "oracle", "executed-together"}
    for row in results.nll:
        wanted = row.domain == "pooled" and row.context in (None, results.context)
        in_table = wanted and (row.policy in shown or row.kind) and 1 <= row.big_layers <= 5
        if in_table or (wanted and row.policy in ("all-small", "all-big")):
            assert with_interval(row.nll) in text
    assert "| router (linear) |" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in table} == {7}
    assert "480 tokens of 24 held-out documents (code and prose)" in text


def test_new_results_take_the_place_of_older_ones(card, tmp_path):
    write_run(tmp_path / "run", Plan(router_budgets=()), words={"code": ["def", " f"]})
    results = analyse(tmp_path / "run", 100)
    add_results(card, replace(results, context="reference"))
    add_results(card, results)
    text = card.read_text()
    assert text.count("## Results") == 1
    assert '"shared"' in text
    assert "router" not in text
    assert "held-out documents (code)" in text
