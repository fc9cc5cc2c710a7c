"""The page in a real browser: Debian's chromium, driven by playwright; skipped where one of them is missing."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest

from browsing import HOSTILE, visit
from duollm.analysis.analyse import analyse
from duollm.analysis.results import read_results
from duollm.analysis.verdicts import over_seeds
from duollm.config import Recipe, ReportConfig
from duollm.models.branch import Branch
from duollm.recipe_files import to_yaml
from duollm.records.keys import Key
from duollm.records.tokens import read_tokens
from duollm.report.page import compare_reports, write_report
from synthetic_run import Plan, write_run

SEEDS = {"owl": 0, "crow": 1}
VIEWS = ("overview", "tokens", "layers", "claims", "tables", "figures", "run")


def backgrounds(tab):
    return tab.eval_on_selector_all("#text .words span", "nodes => nodes.map(node => node.style.background)")


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_every_view_opens_and_nothing_is_wider_than_the_screen(tab, page_run, width, scheme):
    tab.set_viewport_size({"width": width, "height": 800})
    tab.emulate_media(color_scheme=scheme)
    for view in VIEWS:
        visit(tab, page_run, view)
        assert len(tab.inner_text(f"#view-{view}")) > 100
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), view


def test_hostile_text_is_shown_and_never_run(tab, page_run):
    visit(tab, page_run, "tokens?domain=prose")
    words = tab.eval_on_selector_all("#text [data-t]", "nodes => nodes.slice(0, 8).map(node => node.textContent)")
    assert words == [*HOSTILE[:2], "�", "�", " $", "漢", "🙂", "↵\n"]
    assert tab.query_selector("#text img, #text script") is None


def test_pointing_shows_the_numbers_of_the_files(tab, page_run):
    tokens = read_tokens(page_run, "prose")[0]
    small_T, oracle_T = tokens.policies[Key("all-small", 0)].nll_T, tokens.oracle(3).nll_T
    high_T, helped_T = small_T >= np.quantile(small_T, 0.75), small_T - oracle_T >= np.median(small_T - oracle_T)
    hard_T = np.where(helped_T, "high loss, gain above the median", "high loss, gain below the median")
    classes = np.where(high_T, hard_T, "other tokens")
    visit(tab, page_run, "tokens?domain=prose&k=3")
    for t in (0, 14):
        tab.hover(f'#text [data-t="{t}"]')
        shown = {"all-big": Key("all-big", 6), "oracle": Key("oracle", 3, context="shared")}
        shown |= {"static": Key("static", 3), "gains": Key("gains_k3", 3, "gains", "average")}
        for variant, key in shown.items():
            if key in tokens.policies:
                cell = tab.inner_text(f'#token tr[data-policy="{variant}"] td')
                assert float(cell) == pytest.approx(tokens.policies[key].nll_T[t], abs=5.1e-3)
        rank = tokens.file.integers("rank")[t]
        assert f"its {rank}" in tab.inner_text("#token h4")
        assert f"Class: {classes[t]}" in tab.inner_text("#token")
        words = tab.locator("#token .predicted bdi").all_inner_texts()
        assert len(words) == 5
        if "漢" in tokens.file.lists("top5_text")[t]:
            assert "漢" in words
        assert tab.locator("#token .predicted .hit").count() == (rank <= 5)
        route = "".join(map(str, tokens.oracle(3).routes_TL[t]))
        assert route in tab.get_attribute('#token tr[data-policy="oracle"] svg', "aria-label")


def test_quantity_budget_and_policy_recolour(tab, page_run):
    visit(tab, page_run, "tokens?domain=prose&q=loss")
    before = backgrounds(tab)
    for label, value in (("Colour", "difficulty"), ("Big layers", "4"), ("Colour", "above"), ("Policy", "linear")):
        tab.get_by_label(label, exact=True).select_option(value)
        assert backgrounds(tab) != before, label
        before = backgrounds(tab)


def test_filter_search_pins_and_sides_live_in_the_address(tab, page_run):
    visit(tab, page_run, "tokens?domain=prose&q=loss")
    tab.get_by_label("Tokens", exact=True).select_option("stuck")
    assert tab.locator("#text .dim").count() > 0
    tab.get_by_label("Search").type("漢")
    assert "found 20 times" in tab.inner_text("#counted")
    tab.click('#text [data-t="5"]')
    tab.get_by_label("Beside it").select_option("linear")
    assert tab.locator("#text .block").first.locator(".words").count() == 2
    address = tab.evaluate("location.hash")
    before = backgrounds(tab)
    visit(tab, page_run, address[1:])
    assert backgrounds(tab)[:20] == before[:20]
    assert tab.locator("#pinned thead th").count() == 2


def test_the_keyboard_moves_and_pins(tab, page_run):
    visit(tab, page_run, "tokens")
    tab.focus("#text")
    for key in ("ArrowRight", "ArrowRight", "Enter"):
        tab.keyboard.press(key)
    assert "pins=1" in tab.evaluate("location.hash")


def test_tables_sort_and_lines_can_be_hidden(tab, page_run):
    visit(tab, page_run, "tables")
    tab.click("#all-losses summary")
    tab.click("#losses thead button >> text=k")
    ks = [int(k) for k in tab.locator("#losses tbody td:nth-child(2)").all_inner_texts()]
    assert ks == sorted(ks)
    visit(tab, page_run, "overview")
    tab.wait_for_selector('#frontier [data-series="hindsight (oracle)"]', state="attached")
    tab.click("#frontier .legend button >> text=hindsight (oracle)")
    assert tab.locator('#frontier [data-series="hindsight (oracle)"]').count() == 0


def test_tables_and_charts_can_be_saved(tab, page_run):
    visit(tab, page_run, "tables")
    with tab.expect_download() as saved:
        tab.click("#comparison .downloads button >> text=CSV")
    rows = saved.value.path().read_text().splitlines()
    assert rows[0].startswith("policy,gain over fixed pattern,gain over fixed pattern low,")
    assert len(rows) == 1 + tab.locator("#comparison tbody tr").count()
    visit(tab, page_run, "overview")
    for kind, begin in (("SVG", "<svg"), ("CSV", "line,")):
        with tab.expect_download() as saved:
            tab.click(f"#frontier .downloads button >> text={kind}")
        assert saved.value.path().read_text().startswith(begin)
        assert saved.value.suggested_filename == f"frontier-pooled-shared.{kind.lower()}"


def test_a_point_of_difficulty_leads_to_its_token(tab, page_run):
    tokens = read_tokens(page_run, "prose")[0]
    small_T, oracle_T = tokens.policies[Key("all-small", 0)].nll_T, tokens.oracle(2).nll_T
    visit(tab, page_run, "figures?pool=prose")
    chart = tab.locator("figure.chart", has_text="Difficulty against loss")
    assert chart.locator("path[data-group]").count() == 3
    chart.locator("svg").first.focus()
    tab.keyboard.press("ArrowRight")  # the token of the lowest loss
    t = int(small_T.argmin())
    assert f"loss {small_T[t]:.2f}, of which the oracle removes " in chart.inner_text().replace("\u2212", "-")
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#text .current")
    assert tab.get_attribute("#text .current", "data-t") == str(t)
    cell = tab.inner_text('#token tr[data-policy="oracle"] td')
    assert float(cell) == pytest.approx(oracle_T[t], abs=5.1e-3)


def compared_page(folder, **plans):
    """Write a page of several runs, each made from a plan and from the words of its text."""
    recipe = Recipe(report=ReportConfig(bootstrap_samples=100))
    for name, (plan, words) in plans.items():
        write_run(folder / name, plan, {"prose": words})
        (folder / name / "config.yaml").write_text(to_yaml(recipe.model_copy(update={"seed": plan.seed})))
    compare_reports([folder / name for name in plans], folder / "report.html")


@pytest.fixture(scope="module")
def two_seeds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeds")
    compared_page(folder, **{name: (Plan(documents=6, seed=seed), ["a", " b"]) for name, seed in SEEDS.items()})
    return folder


def test_runs_stand_side_by_side(tab, two_seeds):
    """The same text under two models: the second run has a policy's losses of its own."""
    owl, crow = (read_tokens(two_seeds / name, "prose")[0].oracle(3).nll_T for name in ("owl", "crow"))
    visit(tab, two_seeds, "")
    for name in ("owl", "crow"):
        tab.wait_for_selector(f'#runs-frontier [data-series="{name} · hindsight (oracle)"]', state="attached")
    assert tab.locator("#runs-numbers tbody tr").count() == 2
    assert [*tab.locator("#runs-settings tbody tr").all_inner_texts()] == ["seed\t0\t1"]
    tab.click("#runs-texts a >> nth=0")
    tab.wait_for_selector("#text .words")
    assert tab.locator("#panenames b").all_inner_texts() == ["owl · all big, k = 6", "crow · all big, k = 6"]
    assert tab.locator("#text .block").first.locator(".words").count() == 2
    tab.get_by_label("Big layers", exact=True).select_option("3")
    tab.hover('#text [data-t="4"] >> nth=0')
    for variant, nll_T in (("oracle", owl), ("crow · oracle", crow)):
        cell = tab.inner_text(f'#token tr[data-policy="{variant}"] td')
        assert float(cell) == pytest.approx(nll_T[4], abs=5.1e-3)
    assert owl[4] != crow[4]
    tab.get_by_label("Run", exact=True).select_option("1")
    assert tab.title().startswith("crow ")
    assert "run=1" in tab.evaluate("location.hash")


def test_every_run_has_its_own_verdicts_and_seeds_decide_together(tab, two_seeds):
    runs = [read_results(two_seeds / name) for name in SEEDS]
    visit(tab, two_seeds, "runs")
    assert tab.locator("#runs-claims thead th").all_inner_texts() == ["claim", *SEEDS, "together"]
    rows = tab.locator("#runs-claims tbody tr")
    for name in ("C1", "C3", "C6"):
        claims = [next(one for one in run.claims if one.id == name) for run in runs]
        cells = rows.filter(has=tab.get_by_role("link", name=name, exact=True)).locator("td").all_inner_texts()
        for claim, cell in zip([*claims, over_seeds(claims)], cells, strict=True):
            assert claim.verdict in cell
            assert f"{claim.estimate.value:.3f} [".replace("-", "\u2212") in cell
    assert "C14, C15, C16" in tab.inner_text("#runs-open")
    rows.first.get_by_role("link").click()
    assert tab.locator(".claim.chosen h2").inner_text().startswith("C1:")


def test_every_run_has_its_own_name_for_the_cheapest_policy(tab, tmp_path):
    plan = Plan(documents=4, measures=False)
    skipping = replace(plan, branches=(Branch.SKIP, Branch.BIG))
    compared_page(tmp_path, owl=(plan, ["a", " b"]), crow=(skipping, ["a", " b"]))
    for run, own, other in ((0, "all small", "crow · all skipped"), (1, "all skipped", "owl · all small")):
        visit(tab, tmp_path, f"overview?run={run}")
        assert own in tab.locator("#frontier .legend button").all_inner_texts()
        visit(tab, tmp_path, f"tokens?run={run}&q=small")
        assert tab.inner_text("#legend b") == f"loss, {own}"
        tab.hover('#text [data-t="4"] >> nth=0')
        named = tab.locator(
            '#token [data-policy="all-small"] th, #token [data-policy$=" all-small"] th'
        ).all_inner_texts()
        assert named == [own, other]
        visit(tab, tmp_path, f"figures?run={run}&pool=prose")
        assert f"loss, {own} (nats)" in tab.locator("#charts").text_content()


def test_a_text_in_other_tokens_is_aligned_by_its_characters(tab, tmp_path):
    """What a model loses on a piece of text that both cut alike is divided among the other model's tokens by length."""
    plan = Plan(documents=4, tokens_per_document=12)
    coarse = (replace(plan, seed=1), [" computation", " i", "s"])
    compared_page(tmp_path, fine=(plan, [" comp", "ut", "ation", " is"]), coarse=coarse)
    nll_T = read_tokens(tmp_path / "coarse", "prose")[0].policies[Key("all-big", 6)].nll_T
    visit(tab, tmp_path, "runs")
    note = tab.inner_text("#runs-texts li")
    assert "48 tokens of fine, over which the losses of coarse's tokens on the same piece of text are spread" in note
    tab.click("#runs-texts a >> nth=0")
    tab.wait_for_selector("#text .words")
    for t, loss in ((0, nll_T[0] * 5 / 12), (1, nll_T[0] * 2 / 12), (3, nll_T[1] + nll_T[2]), (12, nll_T[12] * 5 / 12)):
        tab.hover(f'#text [data-t="{t}"] >> nth=0')
        cell = tab.inner_text('#token tr[data-policy="coarse · all-big"] td')
        assert float(cell) == pytest.approx(loss, abs=1.5e-2)


def test_runs_without_a_common_text_say_so(tab, tmp_path):
    plan = Plan(documents=4)
    compared_page(tmp_path, owl=(plan, ["a", " b"]), crow=(plan, ["c", "d"]))
    visit(tab, tmp_path, "runs")
    assert tab.inner_text("#runs-texts") == "These runs show no text in common."
    assert tab.locator("#runs-claims thead th").all_inner_texts() == ["claim", "owl", "crow"]  # one seed, twice
    assert not tab.locator("#runs-together").is_visible()


def test_no_view_has_an_accessibility_fault(tab, page_run, two_seeds):
    """axe-core knows the rules of WCAG that a program can check."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python").Axe()
    for width, scheme in ((1280, "light"), (390, "dark"), (1280, "dark"), (390, "light")):
        tab.set_viewport_size({"width": width, "height": 800})
        tab.emulate_media(color_scheme=scheme)
        for view in ("runs", *VIEWS, "tokens?other=linear&pins=1,3&layer=2&kind=stuck&find=a"):
            visit(tab, two_seeds if view == "runs" else page_run, view)
            if view.startswith("tokens"):
                tab.hover('#text [data-t="4"] >> nth=0')
            faults = axe.run(tab).response["violations"]
            assert [fault["id"] for fault in faults] == [], f"{view}, {width} pixels, {scheme}"


def test_fifty_thousand_tokens_scroll_without_long_tasks(browser, tab, tmp_path):
    """A task's time is that of the processor, for what else this machine does makes a task wait, not work."""
    write_run(tmp_path, Plan(documents=25, tokens_per_document=2000, num_layers=3, router_budgets=(), measures=False))
    analyse(tmp_path, 100)
    assert write_report(tmp_path).stat().st_size < 2.8e6
    visit(tab, tmp_path, "tokens")
    painted = tab.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    tab.wait_for_timeout(500)
    browser.start_tracing(page=tab, categories=["toplevel"])
    tab.evaluate(
        """async () => {
          const frame = () => new Promise(requestAnimationFrame);
          for (let place = 0; place < 60000; place += 300) {
            scrollTo(0, place);
            await frame();
          }
        }"""
    )
    events = json.loads(browser.stop_tracing())["traceEvents"]
    assert tab.locator("#text [data-t]").count() < 4000
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    tasks = [event["tdur"] / 1000 for event in events if "tdur" in event and names.get(event["pid"]) == "Renderer"]
    assert len(tasks) > 200
    assert max(tasks) < 50  # milliseconds
    assert painted < (1000 if os.getloadavg()[0] < (os.cpu_count() or 1) else 5000)
