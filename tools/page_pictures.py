"""Makes the pictures of the report page in docs/figures from the page of a finished quick study.

    python tools/page_pictures.py runs/quick [--out docs/figures]

It needs playwright and a chromium (see CONTRIBUTING.md).
"""

import argparse
import shutil
from pathlib import Path

from duollm.errors import UserError

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FIGURES = Path(__file__).parents[1] / "docs" / "figures"
WIDTH = 1280
VIEWS = {
    "overview": ("overview", 1000),
    "tokens": ("tokens?domain=code&layer=7&pins=30,46&token=40", 1000),
    "layers": ("layers", 760),
    "tables": ("tables", 900),
}
"""By name of the picture: the view as in the page's address, and how many pixels of it are shown."""


def take_pictures(run: Path, out: Path = FIGURES) -> list[Path]:
    """Photograph the views of a run's page; return the pictures, <out>/report_<view>.png.

    Raises:
        UserError: the run has no page, or this machine has no chromium.
    """
    page = run / "report.html"
    if not page.is_file():
        raise UserError(f"{page}: not found; run `duollm report {run}` first")
    if CHROMIUM is None:
        raise UserError("no chromium on this machine; install Debian's package `chromium`")
    from playwright.sync_api import sync_playwright

    pictures = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for name, (address, height) in VIEWS.items():
            tab = browser.new_page(viewport={"width": WIDTH, "height": height})
            tab.goto(f"{page.resolve().as_uri()}#{address}")
            tab.wait_for_selector("html[data-ready]")
            tab.wait_for_timeout(500)  # the charts follow the first frame
            tab.evaluate("scrollTo(0, 0)")
            pictures.append(out / f"report_{name}.png")
            tab.screenshot(path=pictures[-1])
            tab.close()
        browser.close()
    return pictures


def main() -> None:
    """Take the pictures of the run that the command line names."""
    parser = argparse.ArgumentParser(description="Make the pictures of the report page in docs/figures.")
    parser.add_argument("run", type=Path, help="folder of a finished quick study")
    parser.add_argument("--out", type=Path, default=FIGURES, help="folder of the pictures (default: docs/figures)")
    options = parser.parse_args()
    try:
        print(*take_pictures(options.run, options.out), sep="\n")
    except UserError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
