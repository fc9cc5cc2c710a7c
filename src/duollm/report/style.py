"""The style of figures: colours and markers of policies, panels, and saving."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from warnings import catch_warnings, filterwarnings

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from duollm.analysis.claims.evidence import PAPER_ROUTER
from duollm.analysis.results import PolicyRow
from duollm.files import replacing
from duollm.records.bootstrap import Estimate
from duollm.records.keys import ALL_BIG, ALL_SMALL, CEILING, EXACT, EXECUTED, ORACLE, RANDOM, STATIC

_PLACES = re.compile(r'\b(?:d|x|y)="[^"]*"|translate\([^)]*\)')
_LONG_NUMBER = re.compile(r"-?\d+\.\d{3,}")

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
        """The keywords with which matplotlib draws it as a line with markers."""
        face = "white" if self.hollow else self.colour
        look = {"color": self.colour, "marker": self.marker, "markerfacecolor": face, "linestyle": self.line}
        return look | {"label": self.label}


_POLICIES = {
    ORACLE: Look("oracle", "#0072B2", "o"),
    EXECUTED: Look("oracle, executed together", "#882255", "h"),
    STATIC: Look("static (best fixed pattern)", "#009E73", "s"),
    RANDOM: Look("random patterns, mean", "#8c8c8c", "x"),
    CEILING: Look("predictable ceiling", "#332288", "_"),
    ALL_SMALL: Look("all small", "#000000", "", ":"),
    ALL_BIG: Look("all big", "#000000", "", "--"),
}
ALL_SKIPPED = {"all small": "all skipped"}
"""What to call the policy where no route may be small."""

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


def router_looks(rows: Sequence[PolicyRow]) -> dict[str, Look]:
    """Return a look for every router in `rows`, by `variant`: a colour per kind, hollow markers for exact spending."""
    kinds = sorted({row.kind for row in rows if row.kind}, key=lambda kind: (kind != PAPER_ROUTER, kind))
    looks = {}
    for row in rows:
        if row.kind:
            colour, marker = _ROUTERS[kinds.index(row.kind) % len(_ROUTERS)]
            exact = row.spend == EXACT
            looks[row.variant] = Look(f"router ({row.variant})", colour, marker, "--" if exact else "-", hollow=exact)
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


def domain_panels(domains: Sequence[str], height: float, x: str, y: str) -> tuple[Figure, dict[str, Axes]]:
    """Return a figure with a panel for every domain, whole numbers from left to right."""
    figure, [line] = panels(1, len(domains), 5.4, height)
    for axes, domain in zip(line, domains, strict=True):
        axes.set(title="all domains pooled" if domain == "pooled" else domain, xlabel=x, ylabel=y)
        whole_numbers(axes)
    return figure, dict(zip(domains, line, strict=True))


def legend_below(figure: Figure, axes: Axes, columns: int = 3) -> None:
    """Put the legend of `axes` under the whole figure."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns)


def whole_numbers(axes: Axes) -> None:
    """Mark whole numbers only on the horizontal axis."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def draw_band(axes: Axes, at: Any, estimates: Sequence[Estimate], colour: str, alpha: float = 0.18) -> None:
    """Draw intervals as a band."""
    low, high = [one.low for one in estimates], [one.high for one in estimates]
    axes.fill_between(at, low, high, color=colour, alpha=alpha, linewidth=0)


def errors(estimates: Sequence[Estimate]) -> Any:
    """Return how far the intervals reach below and above the values, [2, N]."""
    return np.array([[one.value - one.low, one.high - one.value] for one in estimates]).T


def smaller(svg: str) -> str:
    """Return matplotlib's SVG with places to a hundredth of a point, and without comments and space between tags."""
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = _PLACES.sub(lambda places: _LONG_NUMBER.sub(_rounded, places[0]), svg)
    return re.sub(r"\s+", " ", re.sub(r">\s+<", "><", svg))


def _rounded(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")


def save(figure: Figure, folder: Path, name: str, pdf: bool = True) -> Path:
    """Write <name>.svg and perhaps <name>.pdf, byte for byte the same for the same figure; return the SVG's path."""
    for suffix, undated in (("svg", {"Date": None}), ("pdf", {"CreationDate": None}))[: 1 + pdf]:
        with replacing(folder / f"{name}.{suffix}") as temporary:
            figure.savefig(temporary, format=suffix, metadata=undated)
            if suffix == "svg":
                temporary.write_text(smaller(temporary.read_text(encoding="utf-8")), encoding="utf-8")
        figure.set_layout_engine("none")  # laid out once; the second format need not repeat it
    return folder / f"{name}.svg"
