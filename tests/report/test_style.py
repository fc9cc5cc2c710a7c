import logging
import warnings

import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager

from duollm.report.style import save, styled, use_fonts_for_all_text


def make_font(path, family, characters):
    """A font that draws each of `characters` as a triangle."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    pen.lineTo((400, 800))
    pen.lineTo((800, 0))
    pen.closePath()
    triangle = pen.glyph()
    names = {ord(character): f"uni{ord(character):04X}" for character in characters}
    glyphs = [".notdef", *names.values()]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(glyphs)
    builder.setupCharacterMap(names)
    builder.setupGlyf(dict.fromkeys(glyphs, triangle))
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (1000, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": family, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return str(path)


@pytest.fixture
def only_own_fonts(monkeypatch):
    own = [entry for entry in fontManager.ttflist if entry.name.startswith(("DejaVu", "Last Resort"))]
    monkeypatch.setattr(fontManager, "ttflist", own)


def drawn(tmp_path, title, ticks):
    """The families of the title and of each tick's label, once the figure is saved without any warning."""
    with styled():
        figure = Figure()
        axes = figure.subplots()
        text = axes.set_title(title)
        axes.set_xticks(range(len(ticks)), ticks)
        use_fonts_for_all_text([figure])
        with warnings.catch_warnings(record=True) as warned:
            save(figure, tmp_path, "figure")
    assert not warned
    return [each.get_fontfamily() for each in (text, *axes.get_xticklabels())]


@pytest.mark.usefixtures("only_own_fonts")
def test_text_falls_back_on_installed_fonts_that_can_draw_it(tmp_path, capfd, caplog):
    for family, characters in {"Owl Sans": "東京🦊", "Cat": "京ไ", "Needless": "東"}.items():
        fontManager.addfont(make_font(tmp_path / f"{family}.ttf", family, characters))
    with caplog.at_level(logging.WARNING, logger="matplotlib"):
        families = drawn(tmp_path, "東京 owls", ["ไ", "plain", "🦊"])
    own, fallen_back = ["sans-serif"], ["sans-serif", "Owl Sans", "Cat"]
    assert families == [fallen_back, fallen_back, own, fallen_back]
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("only_own_fonts")
def test_what_no_font_can_draw_is_said_once(tmp_path, capfd, recwarn):
    drawn(tmp_path, "東京", [*"ไ\u200d東", "plain"])
    out, err = capfd.readouterr()
    assert err.count("\n") == 1
    assert "no installed font can draw 3 of the characters, such as ไ 京 東, which become boxes; install fonts" in err
    assert (out, list(recwarn)) == ("", [])


@pytest.mark.usefixtures("only_own_fonts")
def test_ordinary_text_keeps_its_font_and_says_nothing(tmp_path, capfd):
    assert drawn(tmp_path, "Größe", ["1", "naïve"]) == [["sans-serif"]] * 3
    assert capfd.readouterr() == ("", "")
