import json
from itertools import chain

import numpy as np
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from duollm.config import DataConfig
from duollm.data.corpora import find_corpus
from duollm.data.documents import Document
from duollm.data.packed import PackedData
from duollm.data.packing import SPLITS, distinct, prepare_data, source_fingerprint, split_documents
from duollm.data.tokenizer import END_OF_TEXT, train_tokenizer
from duollm.errors import UserError


def rows_of(packed):
    return pq.read_table(packed.folder / "documents.parquet").to_pylist()


def decoded(packed, row):
    ids = packed.tokens[row["split"]][row["start"] : row["start"] + row["length"]]
    assert ids[-1] == packed.end_of_text_id
    return packed.tokenizer.decode(ids[:-1])


def test_every_document_is_packed_once_with_its_exact_text(packed, corpus):
    texts = {document.name: document.text for document in find_corpus(str(corpus)).documents()}
    rows = rows_of(packed)
    assert {row["document"]: decoded(packed, row) for row in rows} == texts
    assert len(rows) == len(texts)
    assert all(row["bytes"] == len(texts[row["document"]].encode()) for row in rows)


def test_documents_fill_their_split_one_after_another(packed):
    for split in SPLITS:
        rows = [row for row in rows_of(packed) if row["split"] == split]
        ends = np.cumsum([row["length"] for row in rows])
        assert [row["start"] for row in rows] == [0, *ends[:-1]]
        assert len(packed.tokens[split]) == ends[-1]
        assert (packed.tokens[split] == packed.end_of_text_id).sum() == len(rows)


def test_an_end_of_text_token_written_in_a_document_closes_nothing(corpus, config, tmp_path):
    (corpus / "00.txt").write_text(f"one {END_OF_TEXT} two {END_OF_TEXT}")
    packed = prepare_data(config, 0, tmp_path / "data")
    assert sum((packed.tokens[split] == packed.end_of_text_id).sum() for split in SPLITS) == 20


def test_one_split_alone_is_the_same_as_among_all(packed, config, tmp_path):
    tokenizer = str(packed.folder / "tokenizer")
    alone = prepare_data(config.model_copy(update={"tokenizer": tokenizer}), 0, tmp_path / "alone", only=["test"])
    assert list(alone.tokens) == ["test"]
    assert np.array_equal(alone.tokens["test"], packed.tokens["test"])
    assert rows_of(alone) == [row for row in rows_of(packed) if row["split"] == "test"]
    with pytest.raises(UserError, match="unknown split 'train'"):
        alone.windows("train", "owls", 1, 1, 0)


def test_the_manifest_counts_what_was_packed_and_names_no_path(packed, tmp_path):
    manifest = json.loads((packed.folder / "manifest.json").read_text())
    assert manifest["sources"] == [{"domain": "owls", "origin": "folder owls"}]
    assert manifest["sequence_length"] == 16
    assert manifest["vocab_size"] == packed.vocab_size == len(packed.tokenizer) == 300
    for split in SPLITS:
        rows = [row for row in rows_of(packed) if row["split"] == split]
        counts = {"documents": len(rows), "tokens": len(packed.tokens[split])}
        assert manifest["splits"][split] == {"owls": counts}
    assert str(tmp_path) not in json.dumps(manifest)


def test_no_text_of_one_split_is_in_another_though_documents_are_repeated(corpus, write_corpus, tmp_path):
    other = write_corpus(tmp_path / "cats", documents=12, seed=1)
    for number in range(8):
        text = (corpus / f"{number:02}.txt").read_text(encoding="utf-8")
        (corpus / f"copy{number}.txt").write_text(text, encoding="utf-8")
        (other / f"copy{number}.txt").write_text(text, encoding="utf-8")
    config = DataConfig(domains=[str(corpus), str(other)], vocab_size=300, sequence_length=16)
    packed = prepare_data(config, 0, tmp_path / "data")
    texts = [decoded(packed, row) for row in rows_of(packed)]
    assert len(texts) == len(set(texts)) == 20 + 12
    assert packed.domains == ["owls", "cats"]


def test_the_tokenizer_sees_the_train_split_only(config, tmp_path):
    packed = prepare_data(config, 3, tmp_path / "data")
    train = [decoded(packed, row) for row in rows_of(packed) if row["split"] == "train"]
    expected = train_tokenizer(train, config.vocab_size)
    assert packed.tokenizer.backend_tokenizer.to_str() == expected.backend_tokenizer.to_str()


def test_a_sample_of_a_large_train_split_trains_the_tokenizer(config, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("duollm.data.packing._TOKENIZER_CHARACTERS", 1000)
    monkeypatch.setattr(
        "duollm.data.packing.train_tokenizer", lambda texts, size: seen.extend(texts) or train_tokenizer(texts, size)
    )
    packed = prepare_data(config, 0, tmp_path / "data")
    train = {decoded(packed, row) for row in rows_of(packed) if row["split"] == "train"}
    assert set(seen) < train
    assert sum(map(len, seen[:-1])) < 1000 <= sum(map(len, seen))


def test_an_existing_tokenizer_is_used_as_it_is(config, tmp_path):
    train_tokenizer(["owls read letters"], 262).save_pretrained(tmp_path / "mine")
    packed = prepare_data(config.model_copy(update={"tokenizer": str(tmp_path / "mine")}), 0, tmp_path / "data")
    assert packed.vocab_size == 262
    assert {decoded(packed, row) for row in rows_of(packed)} == {
        d.text for d in find_corpus(config.domains[0]).documents()
    }


def with_unused_words(vocab_size):
    """A tokenizer of `vocab_size` tokens, most of which no text contains."""
    state = json.loads(train_tokenizer(["owls read letters"], 260).backend_tokenizer.to_str())
    state["model"]["vocab"] |= {f"unused {index}": index for index in range(260, vocab_size)}
    backend = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_token_files_are_as_narrow_as_the_vocabulary_allows(config, tmp_path, vocab_size, dtype):
    with_unused_words(vocab_size).save_pretrained(tmp_path / "mine")
    packed = prepare_data(config.model_copy(update={"tokenizer": str(tmp_path / "mine")}), 0, tmp_path / "data")
    assert packed.vocab_size == vocab_size
    assert {array.dtype for array in packed.tokens.values()} == {np.dtype(dtype)}
    assert isinstance(packed.tokens["train"], np.memmap)


def test_the_same_seed_gives_the_same_bytes_and_another_a_different_split(packed, config, tmp_path):
    same = prepare_data(config, 0, tmp_path / "same")
    for path in packed.folder.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (same.folder / path.relative_to(packed.folder)).read_bytes(), path.name
    other = prepare_data(config, 1, tmp_path / "other")
    assert other.fingerprint != packed.fingerprint


def test_both_fingerprints_change_with_a_byte_of_the_source(packed, config, corpus, tmp_path):
    before = source_fingerprint(config, 0)
    assert source_fingerprint(config, 0) == before
    path = corpus / "03.txt"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert source_fingerprint(config, 0) != before
    assert prepare_data(config, 0, tmp_path / "changed").fingerprint != packed.fingerprint


def test_the_source_fingerprint_follows_settings_seed_and_tokenizer(config, tmp_path):
    folder = tmp_path / "mine"
    train_tokenizer(["owls read letters"], 262).save_pretrained(folder)
    given = config.model_copy(update={"tokenizer": str(folder)})
    fingerprints = [
        source_fingerprint(config, 0),
        source_fingerprint(config, 1),
        source_fingerprint(config.model_copy(update={"vocab_size": 301}), 0),
        source_fingerprint(given, 0),
    ]
    train_tokenizer(["cats read letters"], 262).save_pretrained(folder)
    fingerprints.append(source_fingerprint(given, 0))
    assert len(set(fingerprints)) == 5
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "old_tokenizer").mkdir()
    assert source_fingerprint(given, 0) == fingerprints[-1]


def test_preparing_again_replaces_the_folder_and_a_failure_leaves_it(packed, config, corpus):
    (corpus / "03.txt").write_bytes(b"one\n\xff")
    with pytest.raises(UserError, match=r"03\.txt, line 2: byte 0xff"):
        prepare_data(config, 0, packed.folder)
    assert PackedData.open(packed.folder).fingerprint == packed.fingerprint
    (corpus / "03.txt").unlink()
    again = prepare_data(config, 0, packed.folder)
    assert len(rows_of(again)) == 19
    assert [path.name for path in packed.folder.parent.glob(".*")] == []


def test_progress_tells_each_step(config, tmp_path):
    lines = []
    prepare_data(config, 0, tmp_path / "data", lines.append)
    assert lines == ["reading owls: folder owls", "training a tokenizer of 300 tokens", "packing tokens"]


def test_a_single_text_file_is_too_few_documents(corpus, tmp_path):
    config = DataConfig(domains=[str(corpus / "00.txt")])
    with pytest.raises(UserError, match="domain '00' has 1 different documents; at least 6 are needed"):
        prepare_data(config, 0, tmp_path / "data")


def test_too_little_text_for_a_sequence_is_an_error(config, tmp_path):
    with pytest.raises(UserError, match=r"the train split has \d+ tokens; sequences of 100000 need at least 199999"):
        prepare_data(config.model_copy(update={"sequence_length": 100_000}), 0, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_two_domains_of_one_name_are_refused(corpus, write_corpus, tmp_path):
    other = write_corpus(tmp_path / "elsewhere" / "owls", seed=1)
    with pytest.raises(UserError, match="two domains are called 'owls'"):
        prepare_data(DataConfig(domains=[str(corpus), str(other)]), 0, tmp_path / "data")


def documents(count, domain="d"):
    return [Document(domain, f"{number}.txt", f"text {number}") for number in range(count)]


@pytest.mark.parametrize(("count", "sizes"), [(6, (2, 2, 2)), (10, (6, 2, 2)), (100, (80, 5, 15))])
def test_every_document_is_in_exactly_one_split_of_the_size_asked_for(count, sizes):
    given = documents(count)
    splits = split_documents("d", given, 0.05, 0.15, seed=0)
    assert tuple(len(splits[split]) for split in SPLITS) == sizes
    assert sorted(chain(*splits.values()), key=given.index) == given


def test_the_split_depends_on_the_seed_and_the_domain_alone():
    def split(seed, domain="d"):
        return split_documents(domain, documents(50), 0.1, 0.1, seed)

    assert split(1) == split(1)
    assert split(1) != split(2)
    assert split(1) != split(1, "other")


def test_too_few_documents_say_what_a_document_is():
    with pytest.raises(UserError, match=r"domain 'd' has 5 different documents; at least 6 are needed.*a JSON line"):
        split_documents("d", documents(5), 0.05, 0.15, seed=0)


def test_shares_that_leave_nothing_to_train_on_are_refused():
    with pytest.raises(UserError, match=r"validation_share \(0\.5\) and test_share \(0\.5\) leave fewer"):
        split_documents("d", documents(20), 0.5, 0.5, seed=0)


def test_of_equal_texts_the_first_is_kept():
    given = [Document("a", "1", "x"), Document("a", "2", "y"), Document("b", "1", "x"), Document("a", "3", "y")]
    assert distinct(given) == given[:2]
