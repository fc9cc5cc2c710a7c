import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote

import pyarrow.parquet as pq
import pytest

from duollm.analysis.analyse import analyse
from duollm.errors import UserError
from duollm.records.numbers import brackets, nats, percent, with_interval
from duollm.report.gain_figures import noise_sentences
from duollm.report.page import write_report
from picking import pick
from synthetic_run import Plan, write_parquet, write_run


@pytest.fixture(scope="module")
def page(compared, tmp_path_factory):
    run = tmp_path_factory.mktemp("page") / "run"
    shutil.copytree(compared[0], run)
    results = compared[2]
    path = write_report(run, shown_documents=1)
    assert path == run / "report.html"
    return path.read_text(encoding="utf-8"), results


class _Balance(HTMLParser):
    """Checks that every tag is closed by its own kind."""

    void = frozenset({"meta", "img", "br", "input"})

    def __init__(self):
        super().__init__()
        self.open, self.images = [], []

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_well_formed_with_every_figure_described(page):
    parser = _Balance()
    parser.feed(page[0])
    assert parser.open == []
    assert len(parser.images) == 10
    assert all(image["alt"] and image["src"].startswith("data:image/svg+xml,") for image in parser.images)


def test_offline_and_small(page):
    html = re.sub(r"data:image/[^\"]*", "", page[0])
    assert not re.search(r"(?:https?:)?//|<script|<link|@import|url\(", html)
    assert len(page[0]) < 1.5e6


def test_figures_on_the_page_are_those_beside_it(own_run):
    analyse(own_run, 100)
    html = write_report(own_run).read_text(encoding="utf-8")
    shown = {unquote(source) for source in re.findall(r'src="data:image/svg\+xml,([^"]*)"', html)}
    assert shown == {path.read_text(encoding="utf-8") for path in (own_run / "figures").glob("*.svg")}


def test_tokens_are_escaped(page):
    assert " &lt;union&gt;" in page[0]
    assert "<union>" not in page[0]
    assert " &amp; " in page[0]


def _cell(estimate):
    return f"{nats(estimate.value)}<small>{brackets(estimate)}</small>"


def test_every_claim_and_every_loss_is_printed(page):
    html, results = page
    for claim in results.claims:
        for condition in claim.conditions:
            assert with_interval(condition.estimate) in html
        assert claim.statement in html.replace("&#39;", "'")
    for row in results.nll:
        if row.domain != "pooled" and "ramp" not in row.policy:
            assert _cell(row.nll) in html


def test_verdicts_are_counted_on_the_pooled_domains(page):
    html, results = page
    pooled = [claim.verdict for claim in results.claims if claim.domain == "pooled"]
    wanted = ", ".join(
        f"{pooled.count(verdict)} {verdict}" for verdict in ("reproduced", "not reproduced", "undecided")
    )
    assert wanted in " ".join(html.split())


def test_the_first_section_gives_a_finding_for_every_claim(page):
    html, results = page
    first = html[html.index('<section class="first"') : html.index("</section>")].replace("\xa0", " ")
    for claim in results.claims:
        assert (claim.finding in first) == (claim.domain == "pooled")


def test_a_sample_of_patterns_is_said(tmp_path, page):
    write_run(tmp_path, Plan(counted_share=0.25))
    analyse(tmp_path, 100)
    html = write_report(tmp_path).read_text(encoding="utf-8")
    assert html.count("on a random 25% of each document") == 3
    assert "on a random" not in page[0]


def _first_screen(html):
    return " ".join(html[: html.index('<h2 id="claims">')].split())


def test_the_first_screen_says_what_the_search_was(own_run, page):
    assert "Every route through it was tried on" in _first_screen(page[0])
    for path in (own_run / "oracle").glob("*[!s].parquet"):
        table = pq.read_table(path)
        facts = json.loads(table.schema.metadata[b"duollm"]) | {"search": "beam"}
        write_parquet(path, {name: table.column(name) for name in table.column_names}, facts)
    analyse(own_run, 100)
    first = _first_screen(write_report(own_run).read_text(encoding="utf-8"))
    assert "Every route" not in first
    assert "searched, but not all of them (beam), on 240 tokens of code" in first


def test_the_first_screen_says_what_a_peek_buys(page):
    html, results = page
    assert noise_sentences(results, "pooled", 2) in _first_screen(html)


def test_every_policy_is_compared_at_every_budget(page):
    html, results = page
    section = html[html.index('<h2 id="comparison">') : html.index('<h2 id="tokens">')]
    assert section.count('type="radio"') == section.count('class="panel"') == 5
    assert section.count(" checked>") == 1
    assert re.search(r'id="budget-2" checked>', section)
    for row in results.comparison:
        if row.kind:
            assert _cell(row.nll) in section
            assert nats(row.gain_at_spent.value, decimals=4) in section
    for row in results.spend:
        if row.domain == "pooled":
            assert brackets(row.exact_minus_average, lambda value: nats(value, 4)) in section


def test_passages_show_where_the_best_router_differs(page):
    html = page[0]
    section = html[html.index('<h3 id="differences">') : html.index('<h2 id="tokens">')]
    assert section.count('<div class="text differ">') == section.count('<div class="text loss">') == 4
    assert "router (gains" in section
    assert "the &lt;union&gt;" not in section  # tokens are escaped one by one
    assert "&lt;union&gt;" in section


def test_files_without_the_newer_measures_give_a_page_without_them(tmp_path):
    write_run(tmp_path, Plan(measures=False))
    analyse(tmp_path, 100)
    html = write_report(tmp_path).read_text(encoding="utf-8")
    assert "a peek at the label?" not in html
    assert "executed together" not in html.lower()
    assert not list((tmp_path / "figures").glob("selection_noise*"))


def test_tables_have_a_column_per_context(page):
    html = page[0]
    assert html.count('<th scope="col">oracle, committed</th>') == 2
    assert html.count('<th scope="col">executed together</th>') == 2
    assert "executed together, committed" not in html


def test_the_gap_is_given_at_what_was_spent_with_the_nominal_one_beside(tmp_path, page):
    write_run(tmp_path, Plan(overspent_share=0.25))
    results = analyse(tmp_path, 100)
    html = write_report(tmp_path).read_text(encoding="utf-8")
    row = pick(results.gap_closed, domain="pooled", big_layers=2)
    assert f"<b>{percent(row.closed_at_spent.value)}</b>" in html
    assert "at the 2.25 big layers spent" in html
    assert f"{with_interval(row.closed, percent)} at nominal k = 2" in html


def test_caveats_name_the_context(page):
    assert "no single forward pass gives them all" in page[0]


def test_one_domain_without_routers(own_run):
    shutil.rmtree(own_run / "evaluate")
    for path in (own_run / "oracle").glob("code*"):
        path.unlink()
    analyse(own_run, 100)
    html = write_report(own_run).read_text(encoding="utf-8")
    assert "not measured" in html
    assert "pooled" not in html


def test_a_run_that_was_not_analysed(own_run):
    with pytest.raises(UserError, match=r"results\.json: no such file"):
        write_report(own_run)


def test_results_that_are_damaged(own_run):
    (own_run / "results.json").write_text(json.dumps({})[:1])
    with pytest.raises(UserError, match="not readable as JSON"):
        write_report(own_run)


def test_no_torch():
    code = "import sys, duollm.report.page; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
