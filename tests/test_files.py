import errno
import json
import os
import shutil
from types import SimpleNamespace

import pytest

from duollm.errors import UserError
from duollm.files import check_folder, check_no_pointer, fingerprint, read_json, replacing, write_json, write_text


def test_text_is_written_with_its_folders(tmp_path):
    write_text(tmp_path / "a" / "b.txt", "Größe")
    assert (tmp_path / "a" / "b.txt").read_text(encoding="utf-8") == "Größe"


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\xff"], ids=["empty", "cut", "deep", "latin-1"])
def test_what_is_no_json_is_a_value_error(tmp_path, text):
    (tmp_path / "a.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"."):
        read_json(tmp_path / "a.json")


def test_json_reads_back(tmp_path):
    value = {"name": "é", "list": [1, 2.5, None]}
    write_json(tmp_path / "value.json", value)
    assert json.loads((tmp_path / "value.json").read_text(encoding="utf-8")) == value


def test_names_that_are_not_utf8_are_written_as_their_escape(tmp_path):
    value = {"argument": os.fsdecode(b"caf\xe9")}
    write_json(tmp_path / "value.json", value)
    assert json.loads((tmp_path / "value.json").read_text(encoding="utf-8")) == value


def interrupted_write(path, fill):
    with replacing(path) as temporary:
        fill(temporary)
        raise KeyboardInterrupt


def fill_folder(folder):
    folder.mkdir()
    (folder / "new").touch()


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "kept.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        interrupted_write(path, lambda temporary: temporary.write_text("half"))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "old").touch()
    with replacing(path) as temporary:
        fill_folder(temporary)
    assert [file.name for file in path.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_folder_leaves_the_old_one(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "old").touch()
    with pytest.raises(KeyboardInterrupt):
        interrupted_write(path, fill_folder)
    assert [file.name for file in path.iterdir()] == ["old"]


def test_fingerprints_follow_the_value_not_its_spelling():
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": (1, 2), "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    assert fingerprint([1, 2]) != fingerprint([2, 1])


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), Exception("No space left on device (os error 28)")],
    ids=["ours", "a library's"],
)
def test_a_full_disk_is_a_line_that_names_the_file_and_leaves_nothing(tmp_path, error):
    (tmp_path / "old").write_text("whole")
    with pytest.raises(UserError, match=r"old cannot be written: No space left on device"), replacing(tmp_path / "old"):
        raise error
    assert (tmp_path / "old").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_file_in_place_of_a_folder_is_a_line_too(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "x", tmp_path / "file" / "x" / "y", tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match="cannot be written"):
            write_text(path, "text")


def test_other_errors_pass_while_writing(tmp_path):
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "x"):
        raise ZeroDivisionError


@pytest.mark.parametrize("name", ["new", "new/er", "."])
def test_folders_that_can_be_made_are_welcome(tmp_path, name):
    check_folder("--out", tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("file", "file is a file; give a folder"),
        ("file/x/y", "file is a file; give a folder"),
        ("dangling", "dangling is a file"),
        ("loop/x", "loop"),
        ("x" * 300, "File name too long"),
        ("x" * 300 + "/y", "File name too long"),
    ],
)
def test_what_is_in_the_way_of_a_folder_is_noticed_before_there_is_anything_to_write(tmp_path, name, expected):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError, match=f"--out .*{expected}"):
        check_folder("--out", tmp_path / name)


def test_a_disk_that_takes_nothing_is_noticed_too(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda *_: False)
        with pytest.raises(UserError, match="may not be written to; give another folder"):
            check_folder("--out", tmp_path / "new")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(UserError, match="has no space left"):
        check_folder("--out", tmp_path / "new")


def test_git_lfs_pointers_are_refused_with_the_way_to_the_file(tmp_path):
    (tmp_path / "pointer").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 5\n")
    (tmp_path / "file").write_text("version 7")
    with pytest.raises(UserError, match="git lfs pull"):
        check_no_pointer(tmp_path / "pointer")
    check_no_pointer(tmp_path / "file")
    check_no_pointer(tmp_path / "absent")
