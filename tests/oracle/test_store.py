import json

import pyarrow.parquet as pq
import pytest

from duollm.errors import UserError
from duollm.oracle.store import KINDS, OracleStore

FACTS = {"num_layers": 3, "big_layers": [0, 1], "model_fingerprint": "a"}


@pytest.fixture
def store(tmp_path):
    return OracleStore(tmp_path / "oracle", FACTS)


def shard(start):
    return {kind: {"row": [start, start + 1], "kind": [kind, kind]} for kind in KINDS}


def test_claiming_leaves_a_manifest_and_is_repeatable(store):
    store.claim()
    store.claim()
    assert json.loads((store.folder / "manifest.json").read_text()) == FACTS


@pytest.mark.parametrize("content", ["", "[1]", "5", "[" * 100_000], ids=["empty", "list", "number", "deep"])
def test_a_damaged_manifest_is_refused_in_one_line(store, content):
    store.folder.mkdir()
    (store.folder / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json: damaged \(.*\); delete the folder") as error:
        store.claim()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"), [("model_fingerprint", "b"), ("big_layers", [0, 1, 2]), ("further", True)], ids=str
)
def test_a_store_of_something_else_is_refused_in_one_line(store, key, value):
    store.claim()
    with pytest.raises(UserError) as refusal:
        OracleStore(store.folder, FACTS | {key: value}).claim()
    message = str(refusal.value)
    assert "\n" not in message
    for part in (str(store.folder), key, repr(FACTS.get(key)), repr(value), "another run folder"):
        assert part in message


def test_a_shard_is_complete_only_with_all_its_files(store):
    assert not store.has_shard("owls", 0)
    *most, last = KINDS
    store.write_shard("owls", 0, {kind: shard(0)[kind] for kind in most})
    assert not store.has_shard("owls", 0)
    store.write_shard("owls", 0, {last: shard(0)[last]})
    assert store.has_shard("owls", 0)
    assert not store.has_shard("owls", 1)
    assert not store.has_shard("cats", 0)


def test_shards_are_joined_in_order_whatever_order_they_came_in(store):
    for number in (2, 0, 1):
        store.write_shard("owls", number, shard(10 * number))
    store.write_shard("cats", 0, shard(99))
    tables = store.read_shards("owls", 3)
    for kind in KINDS:
        assert tables[kind].to_pydict() == {"row": [0, 1, 10, 11, 20, 21], "kind": [kind] * 6}


def test_completing_writes_the_files_with_the_facts_and_removes_only_the_domains_shards(store):
    store.write_shard("owls", 0, shard(0))
    store.write_shard("cats", 0, shard(5))
    store.complete("owls", 1, store.read_shards("owls", 1))
    for kind in KINDS:
        table = pq.read_table(store.path("owls", kind))
        assert json.loads(table.schema.metadata[b"duollm"]) == FACTS
        assert table["row"].to_pylist() == [0, 1]
    assert not store.has_shard("owls", 0)
    assert store.has_shard("cats", 0)


def test_the_token_file_is_written_last(store, monkeypatch):
    store.write_shard("owls", 0, shard(0))
    tables = store.read_shards("owls", 1)
    written = []
    monkeypatch.setattr("duollm.oracle.store.write_result", lambda path, columns, facts: written.append(path))
    store.complete("owls", 1, tables)
    assert written[-1] == store.path("owls")
    assert set(written) == {store.path("owls", kind) for kind in KINDS}
