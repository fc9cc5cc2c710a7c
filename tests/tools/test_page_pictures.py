"""The pictures of the page for the docs, taken from a small page."""

import pytest

import page_pictures
from duollm.analysis.analyse import analyse
from duollm.errors import UserError
from duollm.report.page import write_report
from synthetic_run import Plan, write_run


def test_a_picture_for_every_view(tmp_path):
    pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if page_pictures.CHROMIUM is None:
        pytest.skip("needs chromium")
    with pytest.raises(UserError, match="run `duollm report"):
        page_pictures.take_pictures(tmp_path)
    write_run(tmp_path, Plan(num_layers=8, router_budgets=(2, 4)))
    analyse(tmp_path, 100)
    write_report(tmp_path, figures=False)
    pictures = page_pictures.take_pictures(tmp_path, tmp_path)
    assert [one.name for one in pictures] == [f"report_{name}.png" for name in page_pictures.VIEWS]
    assert all(one.read_bytes().startswith(b"\x89PNG") for one in pictures)
    assert len({one.read_bytes() for one in pictures}) == len(pictures)
