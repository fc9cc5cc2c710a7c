"""How figures look: one colour and marker per policy, one way to save."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from warnings import catch_warnings, filterwarnings

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from duollm.analysis.claims import PAPER_ROUTER
from duollm.analysis.policies import EXACT, variant
from duollm.analysis.statistics import Estimate
from duollm.files import replacing

Row = dict[str, Any]

GREY = "#6b6b6b"
DEPARTURE_COLOURS = "PuOr_r"
_SETTINGS: Any = {
    "font.size": 10.5,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
    "svg.hashsalt": "duollm",
    "savefig.dpi": 150,
}


@dataclass(frozen=True)
class Look:
    """The look of one policy in every figure (colours of Okabe and Ito, safe for the colour-blind)."""

    label: str
    colour: str
    marker: str
    line: str = "-"
    hollow: bool = False

    @property
    def style(self) -> dict[str, Any]:
        """How matplotlib draws it as a line with markers."""
        face = "white" if self.hollow else self.colour
        look = {"color": self.colour, "marker": self.marker, "markerfacecolor": face, "linestyle": self.line}
        return look | {"label": self.label}


_POLICIES = {
    "oracle": Look("oracle", "#0072B2", "o"),
    "executed-together": Look("oracle, executed together", "#882255", "h"),
    "static": Look("static (best fixed pattern)", "#009E73", "s"),
    "random-patterns": Look("random patterns, mean", "#8c8c8c", "x"),
    "ceiling": Look("predictable ceiling", "#332288", "_"),
    "all-small": Look("all small", "#000000", "", ":"),
    "all-big": Look("all big", "#000000", "", "--"),
}
_BEST_ROUTES = Look("best of {drawn} random routes per token", "#56B4E9", "^")
_BEST_PATTERNS = Look("best of {drawn} random patterns", "#B8860B", "d")
_ROUTERS = (
    *(("#D55E00", "D"), ("#CC79A7", "v"), ("#E69F00", "P"), ("#6A3D9A", "*"), ("#8B1A1A", "X")),
    *(("#A6761D", "p"), ("#E7298A", "<"), ("#556B2F", ">"), ("#FF8C69", "8"), ("#4B3F72", "H")),
)


def policy_look(policy: str) -> Look:
    """Return the look of a policy that is not a trained router."""
    if policy in _POLICIES:
        return _POLICIES[policy]
    drawn = policy.split("-")[2]
    best = _BEST_ROUTES if policy.endswith("-routes") else _BEST_PATTERNS
    return Look(best.label.format(drawn=drawn), best.colour, best.marker, best.line)


def router_looks(rows: list[Row]) -> dict[str, Look]:
    """Return a look for every router in `rows`, by `variant`: one colour per kind, hollow where k is spent exactly."""
    named = {row["kind"] for row in rows if row["kind"]}
    kinds = sorted(named, key=lambda kind: (kind != PAPER_ROUTER, kind))
    looks = {}
    for row in rows:
        if row["kind"]:
            colour, marker = _ROUTERS[kinds.index(row["kind"]) % len(_ROUTERS)]
            exact = row["spend"] == EXACT
            name = variant(row)
            looks[name] = Look(f"router ({name})", colour, marker, "--" if exact else "-", hollow=exact)
    return looks


@contextmanager
def styled() -> Iterator[None]:
    """Draw with the settings of all figures."""
    with mpl.rc_context(_SETTINGS), catch_warnings():
        filterwarnings("ignore", "Glyph", UserWarning)  # a line per character and figure; fonts.py says it in one
        yield


def panels(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[list[Axes]]]:
    """Return a figure of rows x columns axes, each about `width` x `height` inches."""
    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).tolist()


def legend_below(figure: Figure, axes: Axes, columns: int = 3) -> None:
    """Put what `axes` labels under the whole figure."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns)


def of_first_context(rows: list[Row]) -> list[Row]:
    """Return the rows of the first context among them: the main one if it was measured."""
    return [row for row in rows if row["context"] == rows[0]["context"]]


def estimate(row: Row, quantity: str) -> Estimate:
    """Return a quantity of a row of results.json with its interval."""
    return Estimate(row[quantity], row[f"{quantity}_low"], row[f"{quantity}_high"])


def save(figure: Figure, folder: Path, name: str) -> Path:
    """Write <name>.svg and <name>.pdf, byte for byte the same for the same figure; return the SVG's path."""
    for suffix, undated in (("svg", {"Date": None}), ("pdf", {"CreationDate": None})):
        with replacing(folder / f"{name}.{suffix}") as temporary:
            figure.savefig(temporary, format=suffix, metadata=undated)
        figure.set_layout_engine("none")  # laid out once; the second format need not repeat it
    return folder / f"{name}.svg"
