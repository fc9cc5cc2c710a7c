import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from duollm.data.documents import Document
from duollm.data.encoding import Encoder
from duollm.data.tokenizer import END_OF_TEXT, train_tokenizer
from duollm.errors import UserError


def encode(tokenizer, *texts):
    return list(Encoder(tokenizer).encode(Document("d", f"{i}.txt", text) for i, text in enumerate(texts)))


def characters(alphabet, unknown=None):
    """A tokenizer of single characters, `</s>` at the end; others are unknown or silently dropped."""
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    specials = [token for token in (unknown, "</s>") if token]
    vocabulary |= {token: len(alphabet) + index for index, token in enumerate(specials)}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token=unknown))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token=unknown)


def metaspace(alphabet):
    """As SentencePiece models do it: a space is `▁`, and one is put before the text."""
    tokenizer = characters(alphabet + "▁")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.backend_tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def test_ids_are_those_of_the_tokenizer_called_on_each_text():
    texts = ["the owl reads", "  indented\n\tréads ☃", "x"]
    tokenizer = train_tokenizer(texts, 280)
    assert encode(tokenizer, *texts) == [tokenizer(text).input_ids for text in texts]


def test_many_batches_keep_the_order(monkeypatch):
    monkeypatch.setattr("duollm.data.encoding._BATCH_CHARACTERS", 10)
    texts = [f"text number {number}" for number in range(50)]
    tokenizer = train_tokenizer(texts, 280)
    assert [tokenizer.decode(ids) for ids in encode(tokenizer, *texts)] == texts


def test_a_special_token_written_out_is_text_like_any_other():
    tokenizer = train_tokenizer(["owls read"], 280)
    text = f"before {END_OF_TEXT} after"
    assert tokenizer.eos_token_id in tokenizer(text).input_ids  # what would happen otherwise
    [ids] = encode(tokenizer, text)
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == text


def test_settings_stored_with_a_tokenizer_do_not_cut_or_pad():
    tokenizer = train_tokenizer(["owls read"], 280)
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    [ids] = encode(tokenizer, "a longer text of owls")
    assert tokenizer.decode(ids) == "a longer text of owls"


@pytest.mark.parametrize("unknown", ["<unk>", None])
def test_a_character_outside_the_vocabulary_is_named_with_document_and_line(unknown):
    tokenizer = characters("abc \n", unknown)
    assert encode(tokenizer, "abc\ncab") == [tokenizer("abc\ncab").input_ids]
    with pytest.raises(UserError) as error:
        encode(tokenizer, "abc", "a b\nb c\na☃b\nab\n☃\n")
    assert "1.txt (domain d), line 3 of its text: the tokenizer cannot represent 'a☃b\\n'" in str(error.value)
    assert "leave data.tokenizer out" in str(error.value)


def test_a_lost_line_break_is_named_with_the_line_that_it_ends():
    with pytest.raises(UserError, match=r"0\.txt \(domain d\), line 1 .* cannot represent 'ab c\\n'"):
        encode(metaspace("abc"), "ab c\nb\n")


def test_the_tokenizers_own_normalisation_is_no_loss():
    tokenizer = characters("abcé ")
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    assert encode(tokenizer, "A e\u0301") == [[0, 4, 3]]


@pytest.mark.parametrize("text", ["a b", " a b", "   a  b"])
def test_the_space_that_sentencepiece_puts_before_a_text_is_no_loss(text):
    tokenizer = metaspace("ab")
    [ids] = encode(tokenizer, text)
    assert tokenizer.decode(ids).strip() == text.strip()
