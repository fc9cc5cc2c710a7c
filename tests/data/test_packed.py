import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from duollm.config import DataConfig
from duollm.data.packed import PackedData, chunks_per_epoch
from duollm.data.packing import prepare_data
from duollm.errors import UserError
from tiny_corpus import write_corpus

BATCH = 4


def with_tokens(packed, tokens):
    """The same data with another train split: a stream that shows where a chunk came from."""
    return replace(packed, tokens={**packed.tokens, "train": np.arange(tokens, dtype=np.uint32)})


def epoch_of(data, epoch, seed=0):
    """All sequences of one epoch, drawn one by one."""
    chunks = chunks_per_epoch(len(data.tokens["train"]), data.sequence_length, "train")
    return np.concatenate([data.train_batch(epoch * chunks + draw, 1, seed) for draw in range(chunks)])


def test_a_batch_depends_on_its_arguments_alone(packed):
    first = packed.train_batch(7, BATCH, seed=1)
    packed.train_batch(500, BATCH, seed=1)
    again = PackedData.open(packed.folder).train_batch(7, BATCH, seed=1)
    np.testing.assert_array_equal(first, again)
    assert first.shape == (BATCH, packed.sequence_length)
    assert first.dtype == np.int64
    assert not np.array_equal(first, packed.train_batch(8, BATCH, seed=1))
    assert not np.array_equal(first, packed.train_batch(7, BATCH, seed=2))


def test_larger_batches_draw_the_same_stream(packed):
    small = np.concatenate([packed.train_batch(step, 2, seed=0) for step in range(50)])
    large = np.concatenate([packed.train_batch(step, 20, seed=0) for step in range(5)])
    np.testing.assert_array_equal(small, large)


@pytest.mark.parametrize("tokens", [31, 32, 16 * 20, 16 * 20 + 15])
def test_an_epoch_takes_each_chunk_once(packed, tokens):
    data = with_tokens(packed, tokens)
    for epoch in range(5):
        chunks = epoch_of(data, epoch)
        assert (np.diff(chunks, axis=1) == 1).all()
        starts = np.sort(chunks[:, 0])
        assert starts[0] < data.sequence_length
        np.testing.assert_array_equal(starts, starts[0] + data.sequence_length * np.arange(len(starts)))
        assert len(starts) == (tokens - 15) // 16


def test_epochs_differ_in_order_and_offset(packed):
    data = with_tokens(packed, 16 * 20)
    epochs = [epoch_of(data, epoch) for epoch in range(10)]
    assert len({int(chunks[:, 0].min()) for chunks in epochs}) > 3
    orders = {tuple(np.argsort(chunks[:, 0])) for chunks in epochs}
    assert len(orders) == 10
    assert tuple(range(20)) not in orders


def test_other_splits_can_be_drawn_from(packed):
    batch = packed.train_batch(0, BATCH, seed=0, split="validation")
    stream = packed.tokens["validation"].tobytes()
    assert all(row.astype(packed.tokens["validation"].dtype).tobytes() in stream for row in batch)


def test_a_split_shorter_than_a_chunk_is_an_error(packed):
    with pytest.raises(UserError, match="the train split has 30 tokens; sequences of 16 need at least 31"):
        with_tokens(packed, 30).train_batch(0, BATCH, seed=0)


def test_windows_are_the_first_tokens_of_their_documents(packed, corpus):
    windows = packed.windows("test", "owls", documents=4, windows_per_document=3, seed=0)
    assert windows.token_ids.dtype == np.int64
    assert len(set(windows.documents)) == 4
    assert list(zip(windows.documents, windows.window, strict=True)) == [
        (name, window) for name in sorted(set(windows.documents)) for window in range(3)
    ]
    for name in set(windows.documents):
        ids = packed.tokenizer((corpus / name).read_text(encoding="utf-8")).input_ids
        mine = [row for row, document in zip(windows.token_ids, windows.documents, strict=True) if document == name]
        assert np.concatenate(mine).tolist() == ids[: 3 * packed.sequence_length]


@pytest.fixture
def two_domains(tmp_path):
    folders = [str(write_corpus(tmp_path / name, 30, seed)) for seed, name in enumerate(("owls", "more"))]
    config = DataConfig(domains=folders, vocab_size=300, sequence_length=16)
    return prepare_data(config, seed=0, folder=tmp_path / "data")


@pytest.mark.parametrize("per_document", [1, 3])
def test_a_balanced_sample_has_the_windows_of_every_domain_in_turn(two_domains, per_document):
    sample_WT = two_domains.balanced_sample("train", 11, per_document, seed=0)
    assert sample_WT.shape == (12, 16)
    for place, domain in enumerate(two_domains.domains):
        windows = two_domains.windows("train", domain, 6, per_document, seed=0)
        np.testing.assert_array_equal(sample_WT[place::2], windows.token_ids[:6])


def test_a_domain_with_fewer_windows_than_another_repeats_in_a_balanced_sample(two_domains, monkeypatch):
    few, many = (two_domains.windows("train", domain, 99, 1, seed=0) for domain in two_domains.domains)
    few = replace(few, token_ids=few.token_ids[:3])
    monkeypatch.setattr(PackedData, "windows", lambda self, split, domain, *_: {"owls": few, "more": many}[domain])
    sample_WT = two_domains.balanced_sample("train", 10**4, 1, seed=0)
    np.testing.assert_array_equal(sample_WT[1::2], many.token_ids)
    np.testing.assert_array_equal(sample_WT[:12:2], np.concatenate([few.token_ids, few.token_ids]))


def test_windows_depend_on_the_seed_and_grow_with_the_number_asked_for(packed):
    def drawn(documents, seed=0):
        return set(packed.windows("test", "owls", documents, 1, seed).documents)

    assert drawn(3) == drawn(3)
    assert drawn(2) < drawn(3) < drawn(99)
    assert len(drawn(99)) == packed.manifest["splits"]["test"]["owls"]["documents"]
    assert len({frozenset(drawn(3, seed)) for seed in range(10)}) > 1


def test_a_document_gives_only_the_full_windows_that_it_has(packed):
    windows = packed.windows("train", "owls", documents=99, windows_per_document=10**6, seed=0)
    rows = packed._rows_of("train", "owls")
    assert len(windows.window) == sum(row["length"] // packed.sequence_length for row in rows)


@pytest.mark.parametrize(
    ("split", "domain", "complaint"),
    [
        ("tests", "owls", "unknown split 'tests'; did you mean 'test'? allowed: test, train, validation"),
        ("test", "owl", "unknown domain 'owl'; did you mean 'owls'? allowed: owls"),
    ],
)
def test_unknown_names_are_explained(packed, split, domain, complaint):
    with pytest.raises(UserError) as error:
        packed.windows(split, domain, 1, 1, seed=0)
    assert complaint in str(error.value)


def test_documents_that_are_all_too_short_are_an_error(packed):
    data = replace(packed, manifest={**packed.manifest, "sequence_length": 10**6})
    with pytest.raises(UserError, match="domain 'owls' has no document of 1000000 tokens in the test split"):
        data.windows("test", "owls", 1, 1, seed=0)


def test_a_folder_without_packed_data_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"not a folder of packed data: manifest\.json is missing"):
        PackedData.open(tmp_path)


def test_every_domain_gives_as_many_documents_as_the_smallest(packed):
    lengths = pq.read_table(packed.folder / "documents.parquet").to_pandas()
    test = lengths[(lengths["split"] == "test") & (lengths["length"] >= packed.sequence_length)]
    fewest = test.groupby("domain").size().min()
    assert packed.documents_of_each("test", 999) == fewest > 1
    assert packed.documents_of_each("test", 1) == 1


def damaged(folder, tmp_path, name, content):
    shutil.copytree(folder, tmp_path / "copy")
    path = tmp_path / "copy" / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        PackedData.open(tmp_path / "copy").windows("test", "owls", 3, 1, seed=0)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["manifest.json", "test.npy", "documents.parquet"])
@pytest.mark.parametrize(
    "content",
    [b"", b"<html>", b"[]", b"\xff" * 200, b"[" * 10_000, b"version https://git-lfs.github.com/spec/v1\n"],
    ids=["empty", "html", "list", "binary", "deep", "pointer"],
)
def test_a_damaged_file_is_refused_in_a_line(packed, tmp_path, name, content):
    message = damaged(packed.folder, tmp_path, name, content)
    assert "remove that folder, and `duollm study` makes it anew" in message
    assert "pickle" not in message


@pytest.mark.parametrize("name", ["manifest.json", "test.npy", "documents.parquet"])
def test_a_half_file_is_refused_in_a_line(packed, tmp_path, name):
    whole = (packed.folder / name).read_bytes()
    assert "damaged (" in damaged(packed.folder, tmp_path, name, whole[: len(whole) // 2])


def test_a_missing_file_is_named(packed, tmp_path):
    assert "test.npy is missing" in damaged(packed.folder, tmp_path, "test.npy", None)


@pytest.mark.parametrize("key", ["vocab_size", "sources", "splits", "fingerprint", "sequence_length"])
def test_a_manifest_that_lacks_a_key_is_refused(packed, tmp_path, key):
    manifest = {name: value for name, value in packed.manifest.items() if name != key}
    content = json.dumps(manifest).encode()
    assert f"'{key}' is missing" in damaged(packed.folder, tmp_path, "manifest.json", content)


def test_files_that_do_not_fit_each_other_are_refused(packed, tmp_path):
    manifest = json.loads(json.dumps(packed.manifest))
    manifest["splits"]["test"]["owls"]["tokens"] += 1
    message = damaged(packed.folder, tmp_path / "counts", "manifest.json", json.dumps(manifest).encode())
    assert "test.npy does not hold the" in message
    manifest = {**packed.manifest, "vocab_size": 260}
    message = damaged(packed.folder, tmp_path / "vocabulary", "manifest.json", json.dumps(manifest).encode())
    assert "of 260" in message
