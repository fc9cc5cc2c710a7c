"""The style of figures: colours and markers of policies, fonts for all scripts, and saving."""

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from warnings import catch_warnings, filterwarnings

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text

from duollm.analysis.claims.evidence import PAPER_ROUTER
from duollm.analysis.results import PolicyRow
from duollm.files import replacing
from duollm.records.keys import ALL_BIG, ALL_SMALL, CEILING, EXACT, EXECUTED, ORACLE, RANDOM, STATIC, numbers_in

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
    "lines.markersize": 4.5,
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
    ALL_BIG: Look("all big", "#000000", "", "--"),
}

_BEST_ROUTES = Look("best of {drawn} random routes per token", "#56B4E9", "^")
_BEST_PATTERNS = Look("best of {drawn} random patterns", "#B8860B", "d")
_ROUTERS = (
    *(("#D55E00", "D"), ("#CC79A7", "v"), ("#E69F00", "P"), ("#6A3D9A", "*"), ("#8B1A1A", "X")),
    *(("#A6761D", "p"), ("#E7298A", "<"), ("#556B2F", ">"), ("#FF8C69", "8"), ("#4B3F72", "H")),
)


def policy_look(policy: str, cheapest: str = "all small") -> Look:
    """Return the look of a policy that is not a trained router. `cheapest` is the run's name for all small."""
    if policy == ALL_SMALL:
        return Look(cheapest, "#000000", "", ":")
    if policy in _POLICIES:
        return _POLICIES[policy]
    [drawn] = numbers_in(policy)
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
        filterwarnings(
            "ignore", "Glyph", UserWarning
        )  # a line per character and figure; `use_fonts_for_all_text` says it in one
        yield


def use_fonts_for_all_text(figures: Iterable[Figure]) -> None:
    """Let the text of `figures` fall back on installed fonts. Print one line about characters that no font can draw."""
    own = _drawn_by(findfont(FontProperties()))
    foreign = {text: _printable(text) - own for figure in figures for text in figure.findobj(Text)}
    missing = set().union(*foreign.values())
    families = _families_for(missing)
    for text in [text for text, characters in foreign.items() if characters]:
        text.set_fontfamily([*text.get_fontfamily(), *families])
        text.set_fontweight("normal")  # few such fonts have another
    if missing:
        named = " ".join(sorted(missing)[:5])
        _say_once(
            f"figures: no installed font can draw {len(missing)} of the characters, such as {named}, which become "
            "boxes; install fonts that can, such as Noto Sans CJK and Noto Emoji"
        )


@cache
def _say_once(line: str) -> None:
    """A study draws its figures several times."""
    print(line, file=sys.stderr)


def _printable(text: Text) -> set[str]:
    return {character for character in text.get_text() if character.isprintable()}


def _families_for(missing: set[str]) -> list[str]:
    """Names of installed fonts, each with some of the characters `missing`, which are removed from there."""
    # Last Resort comes with matplotlib, and draws every character as a box.
    # Fonts without serifs first, like the figures' own; then by name, so that figures come out the same.
    found = {entry.name: entry.fname for entry in fontManager.ttflist if not entry.name.startswith("Last Resort")}
    families = []
    for name in sorted(found, key=lambda name: ("sans" not in name.lower(), name)):
        drawn = missing & _drawn_by(found[name]) if missing else None
        if drawn:
            families.append(name)
            missing -= drawn
    return families


def _drawn_by(path: str) -> set[str]:
    try:
        return {chr(code) for code in FT2Font(path).get_charmap()}
    except (OSError, RuntimeError):  # a font that is damaged, or gone since matplotlib listed it
        return set()


def smaller(svg: str) -> str:
    """Return matplotlib's SVG with places to a hundredth of a point, and without comments and space between tags."""
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = _PLACES.sub(lambda places: _LONG_NUMBER.sub(_rounded, places[0]), svg)
    return re.sub(r"\s+", " ", re.sub(r">\s+<", "><", svg))


def _rounded(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")


def save(figure: Figure, folder: Path, name: str) -> Path:
    """Write <name>.svg and <name>.pdf, byte for byte the same for the same figure; return the SVG's path."""
    for suffix, undated in (("svg", {"Date": None}), ("pdf", {"CreationDate": None})):
        with replacing(folder / f"{name}.{suffix}") as temporary:
            figure.savefig(temporary, format=suffix, metadata=undated)
            if suffix == "svg":
                temporary.write_text(smaller(temporary.read_text(encoding="utf-8")), encoding="utf-8")
        figure.set_layout_engine("none")  # laid out once; the second format need not repeat it
    return folder / f"{name}.svg"
