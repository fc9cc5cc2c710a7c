"""The curve of docs/finding.md: how much of the oracle's gain drawn labels buy, and how much is predicted, by model.

    python tools/luck_by_scale.py                              # draws the figure, prints the table
    python tools/luck_by_scale.py keep RUN NAME "COMMAND"      # keeps a run's rows as docs/finding/NAME.json first

A share is a part of the gain over static that the oracle has on the text. Its interval is that of the part: drawn
labels are paired with the text, token by token, so what they leave is known better than either gain.
"""

import argparse
import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from duollm.files import replacing
from duollm.records.bootstrap import Estimate
from duollm.records.keys import AVERAGE
from duollm.report.chart import Chart, Panel, Point, Series, draw_chart, draw_series, level, write_csv
from duollm.report.style import Look, save, styled

DOCS = Path(__file__).parents[1] / "docs"
KEPT = ("model", "data", "selection_noise", "units", "tries", "ceiling", "decomposition", "nll", "comparison")
TEXTS = {"prose": "prose", "code": "code", "pooled": "both domains"}


@dataclass(frozen=True)
class Model:
    """A point of the curve: its name, its rows under docs/, and about a half and about three quarters of its layers."""

    name: str
    path: str
    big_layers: tuple[int, int]


MODELS = (
    Model("quick, 3.8 M, 1 M tokens", "finding/quick.json", (6, 8)),
    Model("quick 49k, 9.6 M, 1 M tokens", "finding/quick-49152.json", (6, 8)),
    Model("reference 6M-0, 5.8 M, 6 M tokens, seed 0", "finding/reference-6m-0.json", (6, 8)),
    Model("reference 6M-1, the same, seed 1", "finding/reference-6m-1.json", (6, 8)),
    Model("reference 13M-0, 13 M tokens, seed 0", "reference/results-0.json.gz", (6, 8)),
    Model("reference 13M-1, the same, seed 1", "reference/results-1.json.gz", (6, 8)),
    Model("reference 13M-2, the same, seed 2", "reference/results-2.json.gz", (6, 8)),
    Model("hour, 14 M, 9 M tokens", "finding/hour.json", (6, 8)),
    Model("width 512, 42 M, 80 M tokens", "finding/width-512.json", (6, 8)),
    Model("SmolLM2 distilled, small FFNs for skips", "finding/smollm2-distilled.json", (15, 24)),
    Model("SmolLM2 FFNs, skipped", "finding/smollm2-ffn-85.json", (15, 24)),
    Model("SmolLM2 layers, skipped", "finding/smollm2-layer-85.json", (15, 24)),
)
ROWS: tuple[tuple[str, str, float, tuple[float, float]], ...] = (
    ("drawn", "bought by drawn labels", 1.0, (0.78, 1.18)),
    ("predicted", "predicted by the ceiling", 0.0, (-0.04, 0.08)),
)
"""Attribute, words for the share of the oracle's gain, the value at which all or nothing is luck, limits."""
PLACES = (Look("half of the layers big", "#0072B2", "o"), Look("two thirds of them, or 24 of 30", "#D55E00", "s"))


@dataclass(frozen=True)
class Shares:
    """What the oracle gains on the text, nats, and the shares of it that drawn labels buy and the ceiling predicts."""

    gain: Estimate
    drawn: Estimate
    predicted: Estimate | None


def keep(run: Path, name: str, command: str) -> Path:
    """Write the rows of a run's results.json that the page cites; return their path."""
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    provenance = {key: results["provenance"][key] for key in ("version", "commit", "seed", "machine")}
    kept = {"command": command, "provenance": provenance} | {key: results[key] for key in KEPT if results.get(key)}
    path = DOCS / "finding" / f"{name}.json"
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(_rounded(kept), ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def _rounded(value: Any) -> Any:
    """The value with numbers of six digits, as the page has them."""
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items() if key != "platform"}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _read(path: Path) -> Any:
    content = path.read_bytes()
    return json.loads(gzip.decompress(content) if path.suffix == ".gz" else content)


def shares(results: dict[str, Any], domain: str, big_layers: int) -> Shares:
    """Return the shares of one domain, or of all pooled, in context shared."""
    here = {"domain": domain, "big_layers": big_layers}
    noise = next(_rows(results["selection_noise"], here | {"context": "shared"}))
    ceiling = next(
        _rows(results.get("ceiling", []), here | {"chosen": True, "shuffled": False, "spend": AVERAGE}), None
    )
    gain, left = _estimate(noise["gain"]), _estimate(noise["gain_beyond_drawn"])
    drawn = Estimate(1 - left.value / gain.value, 1 - left.high / gain.value, 1 - left.low / gain.value)
    predicted = ceiling and {name: part / gain.value for name, part in ceiling["gain"].items()}
    return Shares(gain, drawn, predicted and _estimate(predicted))


def measured() -> dict[str, list[list[Shares]]]:
    """Return, by text, the shares of every model at its two budgets."""
    results = [_read(DOCS / model.path) for model in MODELS]
    pairs = list(zip(results, MODELS, strict=True))
    return {text: [[shares(rows, text, big) for big in model.big_layers] for rows, model in pairs] for text in TEXTS}


def _rows(rows: Sequence[dict[str, Any]], wanted: dict[str, Any]) -> Iterator[dict[str, Any]]:
    return (row for row in rows if wanted.items() <= row.items())


def _estimate(found: dict[str, float]) -> Estimate:
    return Estimate(**found)


def chart(found: dict[str, list[list[Shares]]]) -> Chart:
    """The figure: a column per text, drawn labels above, the ceiling below.

    Args:
        found: by text, for every model its two budgets.
    """
    grid = []
    for what, y, sure, y_range in ROWS:
        line = []
        for text, by_model in found.items():
            series = [level("", sure)]
            for place, look in enumerate(PLACES):
                parts = [(number, getattr(budgets[place], what)) for number, budgets in enumerate(by_model)]
                points = [Point.of(number + 0.3 * place - 0.15, part) for number, part in parts if part]
                series.append(Series(look, points, "points"))
            line.append(Panel(TEXTS[text], "", y, series, draw=_draw, percent=True, y_range=y_range))
        grid.append(line)
    return Chart(grid, width=4, height=3.2, columns=2)


def _draw(axes: Axes, panel: Panel) -> None:
    draw_series(axes, panel)
    names = [model.name.partition(",")[0] for model in MODELS]
    axes.set_xticks(range(len(MODELS)), names, rotation=40, ha="right", fontsize=8.5)
    axes.set_xlim(-0.6, len(MODELS) - 0.4)


def table(found: dict[str, list[list[Shares]]]) -> Iterator[str]:
    """Yield the lines of the Markdown table."""
    texts = list(found)
    drawn = " | ".join(f"drawn, {TEXTS[text]}" for text in texts)
    yield f"| model | layers big | gain, both domains | {drawn} | ceiling, both domains |"
    yield "|---" * (4 + len(texts)) + "|"
    for number, model in enumerate(MODELS):
        for place, big in enumerate(model.big_layers):
            row = [found[text][number][place] for text in texts]
            both = row[texts.index("pooled")]
            cells = [model.name if not place else "", str(big), f"{both.gain.value:.3f}"]
            cells += [_percent(each.drawn) for each in row]
            yield f"| {' | '.join([*cells, _percent(both.predicted) if both.predicted else ''])} |"


def _percent(share: Estimate) -> str:
    value, low, high = (
        f"{100 * part:.1f}".replace("-", "\N{MINUS SIGN}") for part in (share.value, share.low, share.high)
    )
    return f"{value} % [{low}, {high}]"


def main() -> None:
    """Keep a run if asked, then draw and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help="nothing, or: keep RUN NAME COMMAND")
    given = parser.parse_args().what
    if given:
        if len(given) != 4 or given[0] != "keep":
            parser.error("give nothing, or: keep RUN NAME COMMAND")
        print(keep(Path(given[1]), given[2], given[3]))
        return
    found = measured()
    drawn = chart(found)
    with styled():
        figure = draw_chart(drawn)
        save(figure, DOCS / "figures", "luck_by_scale").with_suffix(".pdf").unlink()
    write_csv(drawn, DOCS / "finding" / "luck_by_scale.csv")
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
