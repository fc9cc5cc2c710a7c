import json
import re
import shutil
import subprocess
import sys
from importlib.resources import files

import pytest

from duollm.analysis.analyse import analyse
from duollm.errors import UserError
from duollm.report.page import MODULES, write_report
from reading_pages import data_of
from synthetic_run import Plan, write_run


@pytest.fixture(scope="module")
def page(compared, tmp_path_factory):
    run = tmp_path_factory.mktemp("page") / "run"
    shutil.copytree(compared[0], run)
    path = write_report(run)
    assert path == run / "report.html"
    return path.read_text(encoding="utf-8"), compared[2]


def test_offline_and_small(page):
    html = re.sub(r'<script type="text/plain".*?</script>', "", page[0], flags=re.DOTALL)
    assert not re.search(r"<link[^>]+href=\"(?!data:)|@import|url\(|\bsrc=|\bfetch\(", html)
    assert "default-src 'none'" in html
    assert len(page[0]) < 5e5


def test_the_modules_become_one_script_in_the_order_of_their_imports(page):
    script = page[0][page[0].rindex('<script type="module">') :]
    assert not re.search(r"^(?:import|export) ", script, re.MULTILINE)
    for place, name in enumerate(MODULES):
        text = (files("duollm.report") / "page" / f"{name}.js").read_text(encoding="utf-8")
        imported = re.findall(r'^import .* from "\./(\w+)\.js";$', text, re.MULTILINE)
        assert len(imported) == text.count("\nimport ") + text.startswith("import ")
        assert all(MODULES.index(other) < place for other in imported)


def test_top_level_names_of_the_modules_differ():
    texts = [(files("duollm.report") / "page" / f"{name}.js").read_text(encoding="utf-8") for name in MODULES]
    declared = r"^(?:export )?(?:async )?(?:function|const|let|class) (\w+)"
    names = [name for text in texts for name in re.findall(declared, text, re.MULTILINE)]
    assert len(names) == len(set(names)) > 100


def test_no_text_ends_the_element_that_holds_it(tmp_path):
    hostile = ["</script>", "<script>alert(1)</script>", "<!--", '"\\', "\u2028"]
    write_run(tmp_path, Plan(), {"prose": hostile})
    analyse(tmp_path, 100)
    html = write_report(tmp_path).read_text(encoding="utf-8")
    assert html.count("</script>") == 3  # theme, data and modules: the page's own
    assert data_of(html)["runs"][0]["domains"][0]["text"][:5] == hostile


def test_every_claim_and_every_loss_is_on_the_page(page):
    html, results = page
    [data] = data_of(html)["runs"]
    assert [claim["finding"] for claim in data["results"]["claims"]] == [claim.finding for claim in results.claims]
    for shown, row in zip(data["results"]["nll"], results.nll, strict=True):
        assert shown["nll"] == pytest.approx([row.nll.value, row.nll.low, row.nll.high], rel=1e-4)


def test_the_page_of_a_study_that_goes_on_names_missing_stages_and_draws_no_figures(own_run):
    analyse(own_run, 100)
    html = write_report(own_run, missing=["evaluate"], figures=False).read_text(encoding="utf-8")
    [run] = data_of(html)["runs"]
    assert (run["missing"], run["figures"]) == (["evaluate"], [])
    assert not (own_run / "figures").exists()


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
