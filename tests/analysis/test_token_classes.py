import re
from dataclasses import replace

import pyarrow as pa
import pytest

from duollm.analysis.difficulty import classes_of, forms, is_python, python_classes
from duollm.records.files import ResultFile
from duollm.records.tokens import Tokens

SOURCE = '''"""What it is."""
import os

def f(x1, y="a b"):  # why
    return x1 + 25 if not y else None
'''
PIECES = re.findall(r" ?[A-Za-z_]+| ?\d+|\n +(?=\S)|\n| +| ?[^\sA-Za-z\d]", SOURCE)


def test_the_pieces_are_the_source():
    assert "".join(PIECES) == SOURCE


def named(classes, wanted):
    return [piece.strip() for piece, name in zip(PIECES, classes, strict=True) if name == wanted]


def test_forms():
    classes = forms(PIECES)
    assert named(classes, "line start") == ['"', "import", "def", "return"]
    assert named(classes, "number") == ["1", "1", "25"]
    assert " ".join(named(classes, "word start")) == "What it is os f x y a b why x if not y else None"
    assert {"(", ",", "=", ":", "#"} <= set(named(classes, "punctuation"))
    assert classes.count("line end") == SOURCE.count("\n")


def test_pieces_of_words_and_blanks():
    assert forms(["The", " un", "ion", "-", "s", " ", "\n", "  ", "x"]) == [
        *("line start", "word start", "inside a word", "punctuation", "word start", "blank"),
        *("line end", "indentation", "line start"),
    ]


def test_classes_of_python():
    classes = python_classes(PIECES)
    assert named(classes, "keyword") == ["import", "def", "return", "if", "not", "else", "None"]
    assert named(classes, "identifier") == ["os", "f", "x", "1", "y", "x", "1", "y"]
    assert named(classes, "number") == ["25"]
    assert named(classes, "comment") == ["#", "why"]
    assert "".join(piece for piece, name in zip(PIECES, classes, strict=True) if name == "string") == (
        '"""What it is.""""a b"'
    )
    assert named(classes, "operator") == ["(", ",", "=", ")", ":", "+"]


@pytest.mark.parametrize("length", range(1, len(PIECES)))
def test_a_text_may_end_anywhere(length):
    """What comes later changes nothing but inside a string that has not ended."""
    classes, whole = python_classes(PIECES[:length]), python_classes(PIECES)
    assert len(classes) == length
    if '"' not in PIECES[length - 1] and whole[length - 1] != "string":
        assert classes == whole[:length]


def test_lines_that_python_cannot_read_do_not_spoil_the_next():
    pieces = ["a", " =", " ?", "$", "\n", "  ", "b", "\n", "def", " f", "(", "\n"]
    assert python_classes(pieces)[-4:-1] == ["keyword", "identifier", "operator"]


def tokens_of(domain, rows):
    """Tokens of (document, text before, text)."""
    documents, before, texts = zip(*rows, strict=True)
    table = pa.table({"document": documents, "before": before, "text": texts}).combine_chunks()
    file = ResultFile(None, table, {}, "")
    names, document_T = file.documents()
    return Tokens(domain, file, names, document_T, {})


def test_windows_begin_with_tokens_that_nothing_predicts():
    rows = [("a.py", '"""', "doc"), ("a.py", "", '"""'), ("a.py", "\n", "x"), ("b.py", "if", " y"), ("b.py", "", ":")]
    found = classes_of(tokens_of("code", rows))
    assert found["python"].tolist() == ["string", "string", "identifier", "identifier", "operator"]
    assert found["form"].tolist() == ["word start", "punctuation", "line start", "word start", "punctuation"]


def test_prose_has_forms_only_and_files_without_beginnings_nothing():
    tokens = tokens_of("prose", [("a", "The", " state")])
    assert list(classes_of(tokens)) == ["form"]
    file = replace(tokens.file, table=tokens.file.table.drop_columns(["before"]))
    assert classes_of(replace(tokens, file=file)) == {}


@pytest.mark.parametrize(
    ("domain", "names", "expected"),
    [("code", ["a"], True), ("my-python", ["a"], True), ("src", ["a.py", "b.py"], True), ("src", ["a.py", "b"], False)],
)
def test_python_is_told_by_names(domain, names, expected):
    assert is_python(tokens_of(domain, [(name, "", "x") for name in names])) is expected
