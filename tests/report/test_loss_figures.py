from types import SimpleNamespace

import pandas as pd
import pytest

from duollm.analysis.claims.models import SHARES
from duollm.analysis.claims.runs import Run, columns_of
from duollm.config import Recipe
from duollm.report import loss_figures
from duollm.report.chart import draw_chart
from duollm.report.loss_figures import duo_and_dense, write_duo_and_dense
from hidden_intervals import hidden_intervals
from synthetic_scores import write_scores, write_task

SIZES = {"intermediate_size": 512, "small_intermediate_size": 32}


def column(folder, dense=SHARES, tasks=True, frozen=False):
    """A study whose duo loses 3 - share nats, beside dense models that lose 0.1 less, and perhaps a frozen one."""
    results = SimpleNamespace(claims=[], data={"prose": None}, headline="prose")
    runs = [Run(folder / "study", Recipe.model_validate({"model": SIZES}), results)]
    write_scores(folder / "study", {f"random:{share:g}": 3 - share for share in SHARES})
    write_task(folder / "study", {f"random:{share:g}": 0.3 + share / 10 for share in SHARES})
    for share in dense:
        sizes = SIZES | {"intermediate_size": round(32 + 480 * share)}
        recipe = Recipe.model_validate({"model": sizes, "pretrain": {"branch_shares": (0.0, 0.0, 1.0)}})
        runs.append(Run(folder / f"dense{share}", recipe, None))
        write_scores(folder / f"dense{share}", {"all-big": 2.9 - share})
        if tasks:
            write_task(folder / f"dense{share}", {"all-big": 0.5})
    if frozen:
        made = {"model": SIZES | {"dense": str(folder / "big")}, "pretrain": {"freeze": "big"}}
        runs.append(Run(folder / "frozen", Recipe.model_validate(made), None))
        write_scores(folder / "frozen", {"random:0.5": 3.0})
    return columns_of(runs)[0]


def test_duo_and_dense_models_stand_at_their_shares(tmp_path):
    write_duo_and_dense(column(tmp_path), tmp_path)
    table = pd.read_csv(tmp_path / "duo_and_dense.csv")
    losses = table[table["y axis"].str.startswith("nll")].pivot(index="x", columns="series", values="y")
    assert list(losses.index) == list(SHARES)
    behind = losses["duo, branches at random"] - losses["dense of equal FLOPs"]
    assert behind.to_numpy() == pytest.approx(0.1, abs=1e-4)
    assert set(table["y axis"]) == {"nll (nats per token)", "accuracy on tasks"}
    assert (tmp_path / "duo_and_dense.svg").exists()


def test_the_picture_has_the_number_that_the_paper_gives_it(tmp_path, monkeypatch):
    monkeypatch.setattr(loss_figures, "save", lambda figure, *_: figure.get_suptitle())
    assert write_duo_and_dense(column(tmp_path), tmp_path).startswith("Paper, figure 8. Seed ")


def test_the_one_point_of_the_frozen_model_shows_its_interval(tmp_path):
    chart = duo_and_dense(column(tmp_path, dense=(0.5,), frozen=True))
    assert {len(series.points) for panel in chart.grid[0] for series in panel.series} == {1}
    assert hidden_intervals(chart, draw_chart(chart)) == []


def test_without_tasks_there_is_no_panel_of_accuracy(tmp_path):
    [[panel]] = duo_and_dense(column(tmp_path, tasks=False)).grid
    assert panel.y.startswith("nll")


def test_without_a_dense_run_there_is_nothing_to_draw(tmp_path):
    assert write_duo_and_dense(column(tmp_path, dense=()), tmp_path) is None
