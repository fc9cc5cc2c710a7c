"""The duo beside dense models of equal FLOPs, and one whose big FFNs were frozen (paper, figure 8)."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from duollm.analysis.claims.runs import Column
from duollm.records.bootstrap import Floats, interval
from duollm.report.chart import Chart, Panel, Point, Series, draw_chart, lines, write_csv
from duollm.report.style import Look, save, styled

NAME = "duo_and_dense"
_LOOKS = {
    "duo": Look("duo, branches at random", "#0072B2", "o"),
    "dense": Look("dense of equal FLOPs", "#000000", "s", "--"),
    "frozen": Look("big trained first and frozen", "#D55E00", "D"),
}
_SHARE = "share of big; dense: as wide as the duo is on average"


def duo_and_dense(columns: Sequence[Column]) -> Chart | None:
    """Return loss and accuracy against the share of big, a row per seed; None if no dense or frozen run was scored."""
    grid = [line for column in columns if (line := list(_panels(column)))]
    return Chart([line for line in grid if len(line) == len(grid[0])], 5.0, 3.6) if grid else None


def _panels(column: Column) -> Iterator[Panel]:
    assert column.main.results
    title = f"{column.main.folder.name}, seed {column.seed}"
    if losses := column.losses_beside(column.main.results.headline):
        yield Panel(title, _SHARE, "nll (nats per token)", _series(losses), perplexity=True)
    if accuracies := column.accuracies_beside():
        yield Panel(title, _SHARE, "accuracy on tasks", _series(accuracies))


def _series(beside: Mapping[tuple[str, float], tuple[Floats, Floats]]) -> list[Series]:
    points: dict[str, dict[float, Point]] = {}
    for (model, share), (other_X, duo_X) in beside.items():
        points.setdefault(model, {})[share] = Point.of(share, interval(other_X))
        points.setdefault("duo", {})[share] = Point.of(share, interval(duo_X))
    return [lines(_LOOKS[model], of_model.values()) for model, of_model in points.items()]


def write_duo_and_dense(columns: Sequence[Column], folder: Path) -> Path | None:
    """Write the figure as SVG, PDF and CSV; return the SVG's path, or None if there is nothing to draw."""
    chart = duo_and_dense(columns)
    if chart is None:
        return None
    write_csv(chart, folder / f"{NAME}.csv")
    with styled():
        return save(draw_chart(chart), folder, NAME)
