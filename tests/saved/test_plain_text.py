import io
import sys

import numpy as np
import pytest

from duollm.data.documents import Document
from duollm.data.tokenizer import Encoder, train_tokenizer
from duollm.errors import UserError
from duollm.saved import plain_text
from duollm.saved.plain_text import PlainText, overlapping

TEXT = "One owl.\n\n    Two owls fly;\nthree stay.\n\t\n" * 40 + "The end, an é and a 🙂"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT], 300)


@pytest.mark.parametrize("pieces", [[list(range(20))], [[0], [1, 2, 3], [], list(range(4, 20))]])
@pytest.mark.parametrize(("length", "batch_size"), [(4, 2), (2, 1), (7, 3), (20, 1), (50, 8)])
def test_every_token_but_the_first_is_predicted_once_and_in_order(pieces, length, batch_size):
    batches = list(overlapping(pieces, length, batch_size))
    assert [token for ids_BT in batches for ids_T in ids_BT for token in ids_T[1:]] == list(range(1, 20))
    assert all(ids_BT.shape[0] <= batch_size and 2 <= ids_BT.shape[1] <= length for ids_BT in batches)
    assert all((np.diff(ids_BT) == 1).all() for ids_BT in batches)


def test_windows_are_given_before_the_text_ends():
    def pieces():
        yield from ([token] for token in range(10))
        raise AssertionError("read to the end")

    assert next(overlapping(pieces(), length=4, batch_size=2)).tolist() == [[0, 1, 2, 3], [3, 4, 5, 6]]


@pytest.mark.parametrize("piece", [30, 100, 10**6])
def test_reading_in_pieces_gives_the_tokens_of_the_whole_text(tmp_path, tokenizer, monkeypatch, piece):
    monkeypatch.setattr(plain_text, "_PIECE", piece)
    (tmp_path / "owls.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    plain = PlainText(str(tmp_path / "owls.txt"), tokenizer)
    found = [token for ids_BT in plain.windows(8, 4) for ids_T in ids_BT for token in ids_T[1:].tolist()]
    assert found == next(Encoder(tokenizer).encode([Document("", "", TEXT)]))
    assert plain.tokens == len(found)


def test_the_rest_of_a_text_is_estimated(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(plain_text, "_PIECE", 10_000)
    monkeypatch.setattr("duollm.data.tokenizer._BATCH_CHARACTERS", 1)
    (tmp_path / "owls.txt").write_text(TEXT * 100)
    plain = PlainText(str(tmp_path / "owls.txt"), tokenizer)
    windows = plain.windows(8, 4)
    next(windows)
    guessed = plain.all_tokens
    list(windows)
    assert plain.tokens == pytest.approx(plain.all_tokens, rel=0.01) == pytest.approx(guessed, rel=0.2)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(b"", "is empty"), (b"caf\xe9 au lait", r"not UTF-8, it holds b'\\xe9'"), (None, "cannot be read: No such file")],
)
def test_a_text_that_cannot_be_read_is_refused(tmp_path, tokenizer, content, complaint):
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    with pytest.raises(UserError, match=complaint):
        list(PlainText(str(tmp_path / "text"), tokenizer).windows(8, 4))


def test_standard_input_is_utf_8_whatever_the_locale(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "text").write_bytes("é".encode())
    with (tmp_path / "text").open(encoding="latin-1") as file:
        monkeypatch.setattr(sys, "stdin", file)
        [ids_BT] = PlainText("-", tokenizer).windows(8, 4)
    assert tokenizer.decode(ids_BT[0, 1:].tolist()) == "é"


def test_a_closed_standard_input_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("text"))
    with pytest.raises(UserError, match="closed"):
        list(PlainText("-", tokenizer).windows(8, 4))
