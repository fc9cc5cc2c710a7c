"""What a reader meets on the page: choices that stay, numbers at a tap, saved pictures that explain themselves."""

import pytest

from browsing import visit
from duollm.analysis.results import read_results


def box(tab, selector):
    return tab.locator(selector).first.bounding_box()


def test_four_pins_stay_readable(tab, page_run):
    visit(tab, page_run, "tokens?domain=prose&pins=4,5,6,7&policy=all-big&other=oracle")
    labels = tab.locator("#pinned tbody th")
    assert labels.all_inner_texts().count("all big") == 1
    assert all(one.bounding_box()["width"] > 80 and one.bounding_box()["height"] < 60 for one in labels.all())
    for cell in tab.locator("#pinned td", has=tab.locator("svg")).all():
        strip, holder = cell.locator("svg").bounding_box(), cell.bounding_box()
        assert strip["x"] + strip["width"] <= holder["x"] + holder["width"]


def test_a_tap_shows_the_numbers(phone, page_run):
    visit(phone, page_run, "overview")
    phone.locator("#frontier svg[role=img]").tap()
    readout = phone.locator("#frontier .readout")
    assert readout.is_visible()
    assert readout.locator("tr").count() > 3
    visit(phone, page_run, "layers")
    phone.locator("#maps svg").first.tap()
    assert "of the window" in phone.locator("#maps figcaption").first.inner_text()


def test_the_token_panel_of_a_phone_opens_and_closes(phone, page_run):
    visit(phone, page_run, "tokens?domain=prose&other=linear")
    assert not phone.locator("aside").is_visible()
    assert phone.locator("#text-controls .control:visible").count() == 4
    assert phone.locator(".panename:visible").all_inner_texts()[:2] == phone.locator("#panenames b").all_text_contents()
    phone.locator('#text [data-t="4"]').first.tap()
    phone.get_by_label("Close the token's panel").tap()
    assert not phone.locator("aside").is_visible()
    phone.get_by_text("More or fewer choices").tap()
    assert phone.get_by_label("Search").is_visible()


def test_saved_pictures_hold_title_and_legend(tab, page_run):
    visit(tab, page_run, "overview")
    with tab.expect_download() as saved:
        tab.click("#frontier .downloads button >> text=SVG")
    picture = saved.value.path().read_text()
    shown = tab.locator("#frontier .legend button[aria-pressed=true]").all_inner_texts()
    for text in ("Loss against what is spent", *shown):
        assert f">{text}</text>" in picture
    assert "var(" not in picture
    visit(tab, page_run, "figures?pool=prose")
    with tab.expect_download() as saved:
        tab.locator("figure.chart", has_text="Difficulty against loss").get_by_text("CSV").click()
    assert saved.value.path().read_text().startswith('token,"document, position",loss,')


def test_the_chosen_theme_survives_a_reload(tab, page_run):
    visit(tab, page_run, "overview")
    tab.click("#theme")
    assert tab.get_attribute("html", "data-theme") == "dark"
    tab.reload()
    assert tab.get_attribute("html", "data-theme") == "dark"


@pytest.mark.parametrize("width", [1280, 390])
def test_a_readout_does_not_cover_what_is_pointed_at(tab, page_run, width):
    tab.set_viewport_size({"width": width, "height": 900})
    visit(tab, page_run, "overview")
    plot = box(tab, "#frontier svg[role=img]")
    for share in (0.2, 0.45, 0.55, 0.9):
        tab.locator("#frontier svg[role=img]").hover(position={"x": share * plot["width"], "y": 60})
        x = float(tab.locator("#frontier svg[role=img] > line").get_attribute("x1"))
        plot, readout = box(tab, "#frontier svg[role=img]"), box(tab, "#frontier .readout")
        left = readout["x"] - plot["x"]
        below = readout["y"] >= plot["y"] + plot["height"]
        assert below or not left <= x <= left + readout["width"]


def test_a_budget_that_was_not_compared_is_said_and_kept(tab, page_run):
    visit(tab, page_run, "overview?k=99")
    assert "99 big layers were asked for" in tab.inner_text("#notice")
    for k in (0, 6):
        visit(tab, page_run, f"overview?k={k}")
        assert "there is nothing to choose" in tab.inner_text("#answer")
        assert not tab.locator("#notice").is_visible()
    visit(tab, page_run, "tables?k=0")
    assert "were not compared with 0 big layers" in tab.inner_text("#notice")
    tab.click("nav a[data-view=tokens]")
    assert "k=0" in tab.evaluate("location.hash")


def test_a_chosen_text_holds_in_all_views(tab, page_run):
    visit(tab, page_run, "overview")
    tab.get_by_label("Text", exact=True).select_option("code")
    tab.click("nav a[data-view=layers]")
    assert tab.locator("#layer-controls").get_by_label("Text", exact=True).input_value() == "code"


def test_the_search_counts_and_begins_again(tab, page_run):
    visit(tab, page_run, "tokens?domain=prose")
    field = tab.get_by_label("Search")
    field.type("img src")
    for place in (1, 2):
        field.press("Enter")
        assert tab.inner_text("#hit") == f"{place} of 20"
    field.press("Shift+Enter")
    field.press("Shift+Enter")
    assert tab.inner_text("#hit") == "20 of 20, from the end again"
    field.press("Enter")
    assert tab.inner_text("#hit") == "1 of 20, from the start again"


def test_lines_carry_their_names_where_there_is_room(tab, page_run):
    visit(tab, page_run, "overview")
    names = tab.locator("#frontier svg[role=img] [data-end]")
    assert {"hindsight (oracle)", "fixed pattern", "all big"} <= {one.get_attribute("data-end") for one in names.all()}
    assert names.count() == tab.locator("#frontier .legend button[aria-pressed=true]").count()
    boxes = [box(tab, f'#frontier [data-end="{one.get_attribute("data-end")}"]') for one in names.all()]
    plot = box(tab, "#frontier svg[role=img]")
    assert all(one["x"] + one["width"] <= plot["x"] + plot["width"] for one in boxes)
    tab.set_viewport_size({"width": 390, "height": 900})
    tab.wait_for_selector("#frontier [data-end]", state="detached")


def test_maps_of_one_policy_show_a_row_for_each_class(tab, page_run):
    visit(tab, page_run, "layers")
    tab.get_by_label("Maps of").select_option("oracle")
    titles = [title.split("\n")[0] for title in tab.locator("#maps h3").all_inner_texts()]
    assert [title.split(" \u2212")[0].strip() for title in titles] == [
        *("all tokens", "high loss, gain below the median", "high loss, gain above the median", "other tokens")
    ]
    assert "map=oracle" in tab.evaluate("location.hash")
    rows = [
        row.locator("[data-cell]").evaluate_all("cells => cells.map(cell => cell.dataset.cell)")
        for row in tab.locator("#maps .maprow").all()
    ]
    assert rows[0] != rows[1] != rows[2]


def test_a_figure_for_papers_has_claim_verdict_n_and_seed(tab, page_run):
    results = read_results(page_run)
    visit(tab, page_run, "figures")
    figure = tab.locator("#files li", has_text="layer use by position")
    tokens, documents = (sum(getattr(size, name) for size in results.data.values()) for name in ("tokens", "documents"))
    assert f"n = {tokens:,} tokens of {documents:,} documents; seed {results.provenance['seed']}" in figure.inner_text()
    verdict = next(one.verdict for one in results.claims if (one.id, one.domain) == ("C10", results.headline))
    assert figure.locator(".chip").all_inner_texts() == [f"C10 {verdict}"]
    for kind in ("svg", "pdf", "csv"):
        link = figure.get_by_text(kind.upper(), exact=True).get_attribute("href")
        assert (page_run / link).stat().st_size > 500
    figure.locator(".chip").click()
    assert tab.locator(".claim.chosen h2").inner_text().startswith("C10")


def test_a_claim_about_the_oracle_stands_in_every_context_and_net_of_noise(tab, page_run):
    results = read_results(page_run)
    claim = next(one for one in results.claims if (one.id, one.domain) == ("C1", results.headline))
    contexts, labels = ["shared", "committed"], ["text", "drawn", "net"]
    visit(tab, page_run, "claims")
    table = tab.locator("#claim-C1 > table")
    assert table.locator("tbody th").all_inner_texts() == contexts
    cells = {
        (context, label): table.locator("tbody tr").nth(row).locator("td").nth(column).inner_text()
        for row, context in enumerate(contexts)
        for column, label in enumerate(labels)
    }
    for reading in claim.readings:
        shown = cells.pop((reading.context, reading.labels))
        assert reading.verdict in shown
        assert f"{reading.estimate.value:.3f} [".replace("-", "\u2212") in shown
    assert all("not measured" in cell for cell in cells.values())
    assert "drawn from the model's own prediction" in tab.inner_text("#claims-legend")


def test_every_claim_names_its_source(tab, page_run):
    visit(tab, page_run, "claims")
    assert "Alizadeh et al., figure 4b; the paper's value: lowest at 6 of 12" in tab.inner_text("#claim-C2")
    for claim, number in (("C18", "2604.17228"), ("C19", "2505.12601")):
        assert f"Source: arXiv {number}, a paper by others" in tab.inner_text(f"#claim-{claim}")
        assert number in tab.locator(f"#claim-{claim} a").get_attribute("href")
    assert "C18 and C19 are claims about routers by others" in tab.inner_text("#view-claims")


def test_charts_of_the_same_policies_share_a_legend(tab, page_run):
    visit(tab, page_run, "layers")
    tab.wait_for_selector('#depth [data-series="even use"]', state="attached")
    assert tab.locator("#depth .legend").count() == 1
    tab.click("#depth .legend button >> text=even use")
    assert tab.locator('#depth [data-series="even use"]').count() == 0
