import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from duollm.analysis.numbers import estimate, nats, percent
from duollm.analysis.results import analyse
from duollm.errors import UserError
from duollm.report.page import write_report
from synthetic_run import Plan, write_run


@pytest.fixture(scope="module")
def page(synthetic, tmp_path_factory):
    run = tmp_path_factory.mktemp("page") / "run"
    shutil.copytree(synthetic[0], run)
    results = analyse(run, 100)
    path = write_report(run, shown_documents=1)
    assert path == run / "report.html"
    return path.read_text(encoding="utf-8"), results


class _Balance(HTMLParser):
    """Checks that every tag is closed by its own kind."""

    void = frozenset({"meta", "img", "br"})

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
    assert len(parser.images) == 7
    assert all(image["alt"] and image["src"].startswith("data:image/svg+xml;base64,") for image in parser.images)


def test_offline_and_small(page):
    html = re.sub(r"data:image/[^\"]*", "", page[0])
    assert not re.search(r"(?:https?:)?//|<script|<link|@import|url\(", html)
    assert len(page[0]) < 3e6


def test_tokens_are_escaped(page):
    assert " &lt;union&gt;" in page[0]
    assert "<union>" not in page[0]
    assert " &amp; " in page[0]


def test_every_claim_and_every_loss_is_printed(page):
    html, results = page
    for claim in results["claims"]:
        for condition in claim["conditions"]:
            assert estimate(condition, "estimate") in html
        assert claim["statement"] in html.replace("&#39;", "'")
    for row in results["nll"]:
        if row["domain"] != "pooled":
            assert f"{nats(row['nll'])}<small>[{nats(row['low'])}, {nats(row['high'])}]</small>" in html


def test_verdicts_are_counted_on_the_pooled_domains(page):
    html, results = page
    pooled = [claim["verdict"] for claim in results["claims"] if claim["domain"] == "pooled"]
    wanted = ", ".join(
        f"{pooled.count(verdict)} {verdict}" for verdict in ("reproduced", "not reproduced", "undecided")
    )
    assert wanted in " ".join(html.split())


def test_the_first_section_gives_a_finding_for_every_claim(page):
    html, results = page
    first = html[html.index('<section class="first"') : html.index("</section>")].replace("\xa0", " ")
    for claim in results["claims"]:
        assert (claim["finding"] in first) == (claim["domain"] == "pooled")


def test_a_sample_of_patterns_is_said(tmp_path, page):
    write_run(tmp_path, Plan(counted_share=0.25))
    analyse(tmp_path, 100)
    html = write_report(tmp_path).read_text(encoding="utf-8")
    assert html.count("on a random 25% of each document") == 3
    assert "on a random" not in page[0]


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


def test_numbers_are_printed_with_a_true_minus():
    assert nats(-0.12345) == "\N{MINUS SIGN}0.123"
    assert nats(None) == "\N{EN DASH}"
    assert percent(-0.056) == "\N{MINUS SIGN}6%"


def test_no_torch():
    code = "import sys, duollm.report.page; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
