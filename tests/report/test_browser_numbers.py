"""The numbers and words of the page in a real browser: one definition on all views."""

import re
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from browsing import visit
from duollm.analysis.analyse import analyse
from duollm.analysis.results import read_results, write_results
from duollm.analysis.verdicts import condition, decide
from duollm.records.keys import Key
from duollm.records.tokens import read_tokens
from duollm.report.page import write_report
from synthetic_ceiling import write_ceiling
from synthetic_run import Plan, write_run


def add_static(path):
    """Give an oracle's file the losses of static token by token: those of all small and all big, mixed by budget."""
    table = pq.read_table(path)
    small, big = (table[name].to_numpy() for name in ("nll_small", "nll_big"))
    for k in range(7):
        table = table.append_column(f"nll_static_k{k}", pa.array(small + (k / 6) ** 2 * (big - small)))
    pq.write_table(table, path)


def test_a_policy_is_compared_with_static_at_the_budget_that_it_spent(tab, tmp_path):
    """Also where the chosen budget is one that a policy was not measured at; and as in the tables."""
    write_run(tmp_path, Plan(documents=6, router_budgets=(2, 4), overspent_share=0.5))
    for name in ("prose", "code"):
        add_static(tmp_path / "oracle" / f"{name}.parquet")
    rows = analyse(tmp_path, 100).comparison
    write_report(tmp_path)
    for asked, k in ((2, 2), (3, 2), (5, 4)):
        row = next(row for row in rows if (row.domain, row.kind, row.big_layers) == ("prose", "linear", k))
        visit(tab, tmp_path, f"tokens?domain=prose&policy=linear&k={asked}")
        assert tab.inner_text("#panenames").startswith(f"router (linear), k = {k}")
        assert tab.get_by_label("Big layers", exact=True).input_value() == str(k)
        counted = tab.inner_text("#counted").replace("\u2212", "-")
        assert ("not measured with" in tab.inner_text("main")) == (asked != k)
        assert float(re.search(r"mean (\S+?)[;]", counted)[1]) == pytest.approx(row.gain_at_spent.value, abs=1.5e-3)
        assert f"as in Tables: {row.gain_at_spent.value:+.4f} [" in counted
        visit(tab, tmp_path, f"tokens?domain=prose&policy=linear&other=all-big&q=other&k={asked}")
        assert tab.inner_text("#panenames").endswith("minus all big, k = 6")
    visit(tab, tmp_path, "tokens?domain=prose&policy=all-big&k=3")
    assert "mean 0.000" in tab.inner_text("#counted")


def test_the_predictable_gain_is_that_of_the_best_predictor(tab, tmp_path):
    truths = write_run(tmp_path, Plan(documents=6))
    for name in ("prose", "code"):
        add_static(tmp_path / "oracle" / f"{name}.parquet")
    write_ceiling(tmp_path, truths, (2, 3))
    analyse(tmp_path, 100)
    write_report(tmp_path, figures=False)
    policies = read_tokens(tmp_path, "prose")[0].policies
    ceiling = next(one.nll_T for key, one in policies.items() if (key.policy, key.big_layers) == ("ceiling", 2))
    gain_T = policies[Key("static", 2)].nll_T - ceiling
    visit(tab, tmp_path, "tokens?domain=prose&q=predictable&k=2")
    assert tab.inner_text("#legend b") == "predictable gain"
    shown = re.search(r"mean (\S+)", tab.inner_text("#counted"))[1].replace("\u2212", "-").rstrip(";")
    assert float(shown) == pytest.approx(gain_T.mean(), abs=6e-3)
    visit(tab, tmp_path, "tokens?domain=prose&q=predictable&k=4")
    assert tab.inner_text("#legend b") == "loss of the policy", "there is no predictor at 4"


def test_the_overview_says_what_its_numbers_show(tab, page_run):
    results = read_results(page_run)
    for k in (1, 2, 3):
        noise, router = (
            max(
                (row for row in rows if (row.domain, row.big_layers) == ("pooled", k) and getattr(row, "kind", True)),
                key=lambda row: row.fair_gain.value if hasattr(row, "fair_gain") else 0,
            )
            for rows in (results.selection_noise, results.comparison)
        )
        visit(tab, page_run, f"overview?k={k}")
        cards = tab.inner_text("#cards").replace("\u2212", "-")
        more, gain = noise.gain_beyond_drawn, router.fair_gain
        assert f"minus this is {more.value:+.3f} [{more.low:+.3f}, {more.high:+.3f}] nats" in cards
        verdict = "more than luck" if more.low > 0 else "less than luck" if more.high < 0 else "not shown to be more"
        assert verdict in cards
        assert ("The best router gains" in cards) == (gain.low > 0)
        of = router.of_oracle
        share = f"{100 * of.value:.1f} %"
        told = f"That is {share} [{100 * of.low:.1f} %, {100 * of.high:.1f} %] of the oracle's gain"
        assert (told in cards) == (gain.low > 0)
        visit(tab, page_run, f"tables?k={k}")
        closed, of_predictor = (f'td[data-label="of {name} gain"]' for name in ("oracle's", "predictor's"))
        rows = tab.locator("#comparison tbody tr")
        assert share in rows.filter(has_text=f"router ({router.variant})").locator(closed).inner_text()
        assert set(rows.filter(has_text="oracle").locator(closed).all_inner_texts()) == {"\u2013"}
        assert tab.locator(of_predictor).count() == 0


def test_a_row_below_the_oracle_is_explained(tab, page_run):
    policies = read_tokens(page_run, "prose")[0].policies
    oracle_T, executed_T = (policies[Key(name, 3, context="shared")].nll_T for name in ("oracle", "executed-together"))
    below_T = executed_T - oracle_T
    visit(tab, page_run, "tokens?domain=prose&k=3")
    for t in (int(np.argmin(below_T[:40])), int(np.argmax(below_T[:40]))):
        tab.hover(f'#text [data-t="{t}"]')
        assert tab.locator("#beaten").count() == (below_T[t] < 0)
    assert below_T[:40].min() < -0.02 < 0.02 < below_T[:40].max()


def test_a_tooltip_says_what_its_intervals_are_of(tab, page_run):
    visit(tab, page_run, "overview")
    tab.locator("#frontier svg[role=img]").hover()
    shown = tab.inner_text("#frontier .readout")
    assert "interval of the difference from all big" in shown
    assert re.search(r"all big\s+\d\.\d{3}\s*\n", shown), "a difference of 0 has no interval"


def test_a_claim_that_was_measured_in_part_says_what_is_missing(tab, page_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(page_run, run)
    results = read_results(run)
    seen, unseen = condition("the seen part", np.full(9, 0.5), above=0), condition("the unseen part", None, above=0)
    claims = [
        decide("C13", one.domain, "A claim of two parts", "Found.", seen, unseen) if one.id == "C13" else one
        for one in results.claims
    ]
    write_results(run, replace(results, claims=claims))
    write_report(run, figures=False)
    visit(tab, run, "claims")
    assert "Undecided only because this was not measured: the unseen part." in tab.inner_text("#claim-C13 ul")
    visit(tab, run, "overview")
    lines = tab.locator("#verdicts li")
    assert lines.filter(has_text="C13").inner_text().endswith("A claim of two parts (measured in part).")
    code = next(one for one in claims if (one.id, one.domain) == ("C12", "code"))
    line = lines.filter(has_text="C12").inner_text()
    assert code.verdict in line
    assert line.endswith("(measured on code).")


def test_difficulty_stands_by_class_and_by_token(tab, page_run):
    results = read_results(page_run)

    def cells(table):
        return [
            [cell.split("\n")[0].replace("\u2212", "-") for cell in line.locator("th, td").all_inner_texts()]
            for line in table.locator("tbody tr").all()
        ]

    for pool, domains in (("pooled", results.domains), ("code", ["code"])):
        visit(tab, page_run, f"figures?pool={pool}")
        for holder in ("#classes", "#helped"):
            captions = tab.locator(f"{holder} caption").all_inner_texts()
            assert [text.partition(",")[0] for text in captions] == domains

    def agree(shown, numbers):
        """Whether cells are these numbers as rounded on the page, the missing ones as dashes."""
        for text, value in zip(shown, numbers, strict=True):
            if value is None:
                assert text == "\u2013"
            elif text.endswith(" %"):
                assert float(text[:-2]) == pytest.approx(100 * value, abs=0.51)
            else:
                assert float(text) == pytest.approx(value, abs=5.1e-4)

    classes = sorted((row for row in results.difficulty_by_class if row.domain == "code"), key=lambda row: -row.tokens)
    for row, shown in zip(classes, cells(tab.locator("#classes")), strict=True):
        assert shown[0] == (f"{row.name} (Python)" if row.kind == "python" else row.name)
        measured = (row.nll_small, row.gain, row.gain_drawn, row.high_loss, row.unhelped)  # nothing was predicted
        agree(shown[1:], [row.tokens, *(one and one.value for one in measured)])
    helped = [row for row in results.helped_most if row.domain == "code"]
    for row, shown in zip(helped, cells(tab.locator("#helped")), strict=True):
        assert shown[0] == row.text.replace("\t", "\u21e5").replace(" ", "\u00b7")
        agree(shown[1:], [row.tokens, row.gain, row.gain_drawn, row.gain_all_big])


def test_a_run_without_classes_says_nothing_of_them(tab, page_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(page_run, run)
    write_results(run, replace(read_results(run), difficulty_by_class=[], helped_most=[]))
    write_report(run, figures=False)
    visit(tab, run, "figures")
    assert not tab.locator("#by-class").is_visible()
    assert not tab.locator("#helped-most").is_visible()
