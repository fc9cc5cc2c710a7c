"""A real browser for the page: Debian's chromium, driven by playwright; tests that use it skip where one is missing."""

import shutil

import pytest

from browsing import HOSTILE
from duollm.analysis.analyse import analyse
from duollm.report.page import write_report
from synthetic_run import Plan, write_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page_run(tmp_path_factory):
    run = tmp_path_factory.mktemp("browser")
    write_run(run, Plan(more_routers=True, documents=8), {"prose": HOSTILE, "code": ["def", " f", "(", "\t"]})
    analyse(run, 100)
    write_report(run)
    return run


def opened(browser, **options):
    """Yield a page that fails the test on any message, error, dialog or request."""
    context = browser.new_context(**options)
    page, faults = context.new_page(), []
    page.on("console", lambda message: faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("dialog", lambda dialog: (faults.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: faults.append(request.url) if request.url.startswith("http") else None)
    yield page
    context.close()
    assert faults == []


@pytest.fixture
def tab(browser):
    yield from opened(browser, viewport={"width": 1280, "height": 900})


@pytest.fixture
def phone(browser):
    yield from opened(browser, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
