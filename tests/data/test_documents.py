import bz2
import gzip
import io
import json
import lzma
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from duollm.data.documents import Document, read_file
from duollm.errors import UserError

DEEP = b"[" * 100_000 + b"]" * 100_000


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


LINES = b'{"text": "one"}\n{"text": "two"}\n'


@pytest.mark.parametrize("name", ["a.ndjson", "a.json", "A.JSONL"])
def test_json_lines_have_several_suffixes(tmp_path, name):
    (tmp_path / name).write_bytes(LINES)
    assert read(tmp_path / name) == [(f"{name}:1", "one"), (f"{name}:2", "two")]


@pytest.mark.parametrize(
    ("content", "documents"),
    [
        ('[{"text": "one"}, {"text": "two", "id": 2}]', [(":1", "one"), (":2", "two")]),
        ('{\n  "text": "one",\n  "id": 2\n}', [("", "one")]),
        ('{"name": "a package"}', [("", '{"name": "a package"}')]),
        ('[{"body": "one"}]', [("", '[{"body": "one"}]')]),
        ('// settings\n{\n  {"a": 1}\n}', [("", '// settings\n{\n  {"a": 1}\n}')]),
        ("{{ template }}", [("", "{{ template }}")]),
    ],
    ids=["list", "object", "no text", "list without text", "comments", "template"],
)
def test_json_holds_documents_or_is_a_text(tmp_path, content, documents):
    (tmp_path / "a.json").write_text(content)
    assert read(tmp_path / "a.json") == [("a.json" + place, text) for place, text in documents]


def test_numbers_of_any_length_are_no_reason_to_refuse_a_text(tmp_path):
    line = '{"text": "one", "id": ' + 5000 * "9" + "}\n"
    for name in ("a.jsonl", "a.json"):
        (tmp_path / name).write_text(line * 2)
        assert [text for _, text in read(tmp_path / name)] == ["one", "one"]


def test_a_text_beside_deeply_nested_json_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"x": ' + DEEP + b', "text": "z\\u00f6"}\n{"text": "two"}\n')
    assert [text for _, text in read(tmp_path / "a.jsonl")] == ["zö", "two"]


def compress_by_arrow(codec, content):
    compressed = pa.BufferOutputStream()
    with pa.CompressedOutputStream(compressed, codec) as stream:
        stream.write(content)
    return compressed.getvalue().to_pybytes()


COMPRESS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".lzma": partial(lzma.compress, format=lzma.FORMAT_ALONE),
    ".zst": partial(compress_by_arrow, "zstd"),
    ".lz4": partial(compress_by_arrow, "lz4"),
    ".br": partial(compress_by_arrow, "brotli"),
}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_files_are_read_as_what_they_hold(tmp_path, suffix):
    compress = COMPRESS[suffix]
    lines, text = tmp_path / f"a.jsonl{suffix}", tmp_path / f"a.txt{suffix}"
    lines.write_bytes(compress(LINES))
    text.write_bytes(compress(b"one ") + compress(b"two"))
    assert [each for _, each in read(lines)] == ["one", "two"]
    assert read(text) == [(text.name, "one two")]


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("damage", [lambda whole: whole[:-5], lambda whole: b"plain text"], ids=["cut", "other"])
def test_damaged_compression_is_one_line(tmp_path, suffix, damage):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(damage(COMPRESS[suffix](b"one two " * 100)))
    with pytest.raises(UserError, match=f"a.txt{suffix}: damaged, or not compressed as {suffix} says") as error:
        read(path)
    assert "\n" not in str(error.value)


def write_arrow(table, path):
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)


def write_arrow_stream(table, path):
    """What the library datasets saves."""
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)


TABLES = {
    "parquet": (pq.write_table, "a.parquet"),
    "arrow": (write_arrow, "a.arrow"),
    "arrow stream": (write_arrow_stream, "a.arrow"),
    "feather": (write_arrow, "a.feather"),
}


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.binary(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())],
    ids=str,
)
@pytest.mark.parametrize("format_name", TABLES)
def test_a_table_holds_a_document_per_row(tmp_path, format_name, kind):
    write, name = TABLES[format_name]
    texts = pa.array(["one", "zwölf"])
    try:
        texts = texts.dictionary_encode() if pa.types.is_dictionary(kind) else texts.cast(kind)
    except pa.ArrowNotImplementedError as error:
        pytest.skip(f"pyarrow {pa.__version__}: {error}")
    write(pa.table({"id": [1, 2], "text": texts}), tmp_path / name)
    assert read(tmp_path / name) == [(f"{name}:1", "one"), (f"{name}:2", "zwölf")]
    raw = (tmp_path / name).read_bytes()
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(raw))
    assert [text for _, text in read(tmp_path / f"{name}.gz")] == ["one", "zwölf"]


@pytest.mark.parametrize("format_name", TABLES)
def test_a_table_with_two_text_columns_is_refused(tmp_path, format_name):
    write, name = TABLES[format_name]
    write(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), tmp_path / name)
    with pytest.raises(UserError, match=f"{name}: 2 columns are called 'text'; keep one"):
        read(tmp_path / name)


@pytest.mark.parametrize("format_name", TABLES)
@pytest.mark.parametrize(
    "damage",
    [lambda raw: raw[:-3], lambda raw: raw[: len(raw) // 2], lambda raw: b"", lambda raw: b"plain text " * 50],
    ids=["cut", "half", "empty", "text"],
)
def test_a_damaged_table_is_one_line(tmp_path, format_name, damage):
    write, name = TABLES[format_name]
    made = io.BytesIO()
    write(pa.table({"text": ["one", "two"]}), made)
    (tmp_path / name).write_bytes(damage(made.getvalue()))
    with pytest.raises(UserError, match=rf"{name}: (not an? \w+ file|cannot be read): ") as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_damaged_page_of_a_table_is_one_line(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["one", "two"]}), path)
    raw = path.read_bytes()
    path.write_bytes(raw[:10] + b"\xff" * 30 + raw[40:])
    with pytest.raises(UserError, match=r"a\.parquet: cannot be read: "):
        read(path)


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
        ("a.jsonl", b'{"text": "one", "text": "two"}\n', "a.jsonl, line 1: 2 times the key 'text'; keep one"),
        ("a.jsonl", DEEP, "a.jsonl, line 1: JSON that is nested too deeply"),
        ("a.jsonl", b'{"x": ' + DEEP + b"}\n", "a.jsonl, line 1: JSON that is nested too deeply"),
        ("a.jsonl", b'{"text": "a", "text": "b", "x": ' + DEEP + b"}\n", "line 1: JSON that is nested too deeply"),
        ("a.json", b'{"text": "one", "x": ' + DEEP[:-1] + b"}\n", "a.json, line 1: JSON that is nested too deeply"),
        ("a.json", b'{"text": "one"}\n{"text": "two"\n', "a.json, line 2: not valid JSON"),
        ("a.json", b'{"body": "one"}\n{"body": "two"}\n', "a.json, line 1: no string under the key 'text'"),
        ("a.json", b'[{"text": "one"}, {"body": "two"}]', "a.json, element 2: no string under the key 'text'"),
        ("a.json", b"", "a.json, line 1: the text is empty"),
        ("a.tar", b"", "a.tar: an archive of files; unpack it"),
        ("a.tar.gz", gzip.compress(b"any", mtime=0), "a.tar.gz: an archive of files; unpack it"),
        ("a.7z", b"7z\xbc\xaf", "a.7z: an archive of files; unpack it"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\n", "a.txt is a Git LFS pointer"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", "a.parquet is a Git LFS pointer"),
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
