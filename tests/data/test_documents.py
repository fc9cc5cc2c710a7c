import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from duollm.data.documents import Document, read_file
from duollm.errors import UserError


def read(path):
    return [(document.name, document.text) for document in read_file(path, "domain", path.name)]


def test_a_plain_file_is_one_document_with_its_exact_text(tmp_path):
    path = tmp_path / "a.py"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo \xe2\x80\xa8\n")
    assert list(read_file(path, "code", "lib/a.py")) == [Document("code", "lib/a.py", "one\r\ntwo \u2028\n")]


def test_json_lines_hold_a_document_per_line_named_by_the_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one\\ntwo", "id": 1}\n\n{"text": "three \u2028"}', encoding="utf-8")
    assert read(path) == [("a.jsonl:1", "one\ntwo"), ("a.jsonl:3", "three \u2028")]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary()])
def test_parquet_holds_a_document_per_row(tmp_path, kind):
    path = tmp_path / "a.parquet"
    texts = pa.array([b"one", "zwölf".encode()], pa.binary()).cast(kind)
    pq.write_table(pa.table({"id": [1, 2], "text": texts}), path)
    assert read(path) == [("a.parquet:1", "one"), ("a.parquet:2", "zwölf")]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.txt", b"", "a.txt, line 1: the text is empty"),
        ("a.txt", b" \n\n", "a.txt, line 1: the text is empty"),
        ("a.txt", b"one\ntwo\nthr\xffee", "a.txt, line 3: byte 0xff is not UTF-8"),
        ("a.txt", b"\xef\xbb\xbfone\n\xfe", "a.txt, line 2: byte 0xfe is not UTF-8"),
        ("a.jsonl", b"\n", "a.jsonl: holds no documents"),
        ("a.jsonl", b'{"text": "one"}\n{"text": "two"\n', "a.jsonl, line 2: not valid JSON: Expecting"),
        ("a.jsonl", b'{"text": "one"}\n["two"]\n', 'line 2: expected an object such as {"text": "..."}, got list'),
        ("a.jsonl", b'{"body": "one"}\n', "line 1: no string under the key 'text'; keys here: body"),
        ("a.jsonl", b'{"text": 7}\n', "line 1: no string under the key 'text'"),
        ("a.jsonl", b'{"text": "one"}\n{"text": ""}\n', "line 2: the text is empty"),
        ("a.jsonl", b'{"text": "one"}\n{"text": "\xff"}\n', "a.jsonl, line 2: byte 0xff is not UTF-8"),
        ("a.jsonl", b'{"text": "a \\ud800 b"}\n', "line 1: half a surrogate pair ('\\ud800')"),
        ("a.parquet", b"PAR1", "a.parquet: not a Parquet file"),
    ],
)
def test_bad_text_is_one_error_that_names_file_and_line(tmp_path, name, content, complaint):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read(path)
    assert complaint in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("columns", "complaint"),
    [
        ({"body": ["one"]}, "no column 'text'; columns here: body"),
        ({"text": [1]}, "the column 'text' must hold strings, got int64"),
        ({"text": ["one", None]}, "row 2: the text is empty"),
        ({"text": [b"one", b"\xff"]}, "row 2, line 1: byte 0xff is not UTF-8"),
        ({"text": pa.array([], pa.string())}, "holds no documents"),
    ],
)
def test_bad_tables_are_named_with_their_row(tmp_path, columns, complaint):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(columns), path)
    with pytest.raises(UserError) as error:
        read(path)
    assert complaint in str(error.value)


def test_a_large_table_keeps_its_order(tmp_path):
    path = tmp_path / "a.parquet"
    texts = [json.dumps(number) for number in range(5000)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=700)
    assert read(path) == [(f"a.parquet:{row}", text) for row, text in enumerate(texts, start=1)]
