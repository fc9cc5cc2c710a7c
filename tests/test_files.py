import json
import os

import pytest

from duollm.files import fingerprint, replacing, write_json, write_text


def test_text_is_written_with_its_folders(tmp_path):
    write_text(tmp_path / "a" / "b.txt", "Größe")
    assert (tmp_path / "a" / "b.txt").read_text(encoding="utf-8") == "Größe"


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
