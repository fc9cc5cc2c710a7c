import json
import random
import time

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from duollm.data.documents import Document
from duollm.data.tokenizer import END_OF_TEXT, Encoder, check_vocabulary, for_prompts, load_tokenizer, train_tokenizer
from duollm.errors import UserError

TEXTS = ["the owl reads the letter", "the owl reads\n\tthe other letter"] * 3


def test_a_trained_tokenizer_has_one_special_token_and_every_byte():
    tokenizer = train_tokenizer(TEXTS, 270)
    assert len(tokenizer) == 270
    assert tokenizer.all_special_tokens == [END_OF_TEXT]
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    unseen = "Ünseen ☃ \x00\ttext\r\n "
    assert tokenizer.decode(tokenizer(unseen).input_ids) == unseen
    assert len(tokenizer("the owl").input_ids) < len("the owl")


def test_training_is_deterministic():
    one, two = train_tokenizer(TEXTS, 270), train_tokenizer(iter(TEXTS), 270)
    assert one.backend_tokenizer.to_str() == two.backend_tokenizer.to_str()


LONG_WORDS = {
    "letters": "a" * 300_000,
    "spaces": " " * 300_000 + "end",
    "emoji": "\N{OWL}" * 80_000,
    "genome": "".join(random.Random(0).choices("ACGT", k=100_000)),
}


@pytest.mark.parametrize("text", LONG_WORDS.values(), ids=LONG_WORDS)
def test_a_word_of_any_length_takes_linear_time_and_comes_back(text):
    start = time.process_time()
    tokenizer = train_tokenizer([text], 400)
    ids = tokenizer(text).input_ids
    assert time.process_time() - start < 5  # quadratic time is more than a minute for the letters
    assert tokenizer.decode(ids) == text


def test_ordinary_words_are_learned_whole():
    """The bound must not change tokenizers of ordinary text, on which numbers depend."""
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    texts = [*TEXTS, "an " + "o" * 900 + "wl", "-" * 80, "東京" * 50]
    plain.train_from_iterator(texts, trainer)
    trained, expected = (json.loads(each.to_str()) for each in (train_tokenizer(texts, 300).backend_tokenizer, plain))
    assert (trained["model"], trained["pre_tokenizer"]) == (expected["model"], expected["pre_tokenizer"])


def test_a_vocabulary_below_the_bytes_is_refused():
    with pytest.raises(UserError, match=r"^vocab_size must be at least 257 .* got 256"):
        train_tokenizer(TEXTS, 256)


def test_a_saved_tokenizer_loads_the_same_here_and_in_transformers(tmp_path):
    tokenizer = train_tokenizer(TEXTS, 270)
    tokenizer.save_pretrained(tmp_path)
    for loaded in (load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert loaded.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
        assert loaded.eos_token_id == 0


def test_a_folder_without_tokenizer_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"neither a folder with tokenizer\.json nor a hub id") as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_end_of_text_is_an_error(tmp_path):
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no end-of-text token; set eos_token"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("before", [[], [0], [5, 0]], ids=str)
@pytest.mark.parametrize("behind", [[0], [0, 7]], ids=str)
def test_a_prompt_is_not_closed(before, behind):
    tokenizer = train_tokenizer(TEXTS, 270)
    text = tokenizer("the owl").input_ids
    names = {token: str(tokenizer.convert_ids_to_tokens(token)) for token in [*before, *behind]}
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=[*(names[token] for token in before), "$A", *(names[token] for token in behind)],
        special_tokens=[(name, token) for token, name in names.items()],
    )
    assert tokenizer("the owl").input_ids == [*before, *text, *behind]
    assert for_prompts(tokenizer)("the owl").input_ids == [*before, *text]
    assert for_prompts(tokenizer)("the owl<|endoftext|>").input_ids == [*before, *text, 0], "the user's own"
    assert tokenizer("the owl").input_ids == [*before, *text, *behind], "the tokenizer itself is as it was"


def test_a_tokenizer_that_closes_nothing_is_taken_as_it_is():
    tokenizer = train_tokenizer(TEXTS, 270)
    assert for_prompts(tokenizer) is tokenizer


def test_a_tokenizer_larger_than_its_model_is_refused_with_both_numbers():
    check_vocabulary("model", 270, 270)
    with pytest.raises(UserError, match=r"^model: knows 269 tokens, its tokenizer has 270; resize .*embeddings\(270\)"):
        check_vocabulary("model", 269, 270)


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
    monkeypatch.setattr("duollm.data.tokenizer._BATCH_CHARACTERS", 10)
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
