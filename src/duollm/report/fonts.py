"""Fonts for text that the figures' own font cannot draw, such as Chinese or emoji."""

import sys
from collections.abc import Iterable
from functools import cache

from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text

_BOXES_FOR_ALL = "Last Resort"  # comes with matplotlib, and draws every character as a box
_NAMED_CHARACTERS = 5


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
        named = " ".join(sorted(missing)[:_NAMED_CHARACTERS])
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
    # Fonts without serifs first, like the figures' own; then by name, so that figures come out the same.
    found = {entry.name: entry.fname for entry in fontManager.ttflist if not entry.name.startswith(_BOXES_FOR_ALL)}
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
