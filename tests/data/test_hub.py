import sys
from types import SimpleNamespace

import pytest

from duollm.data.corpora import find_corpus, read_domain
from duollm.data.hub import HubCorpus, parse_data_set_id
from duollm.errors import UserError


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
