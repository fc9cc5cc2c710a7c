"""The tokenizer: a byte-level BPE trained here, or an existing one; and documents as token ids."""

import copy
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from duollm.data.documents import Document
from duollm.errors import UserError, in_a_line
from duollm.files import check_no_pointer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"

_SMALLEST_VOCABULARY = 257  # every byte and the end of text
_LONGEST_WORD = 1024  # bytes; a merge takes quadratic time in the length of a word
_BATCH_CHARACTERS = 1_000_000
_SHOWN_CHARACTERS = 60


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE, which represents any text; deterministic.

    A word of more than 1,024 bytes, such as a long row of spaces, is cut into pieces for training.

    Its only special token, `<|endoftext|>`, has id 0 and serves as beginning, end and padding. It has
    fewer than `vocab_size` tokens if the text has too few different words.

    Raises:
        UserError: `vocab_size` is below 257.
    """
    from transformers import PreTrainedTokenizerFast

    if vocab_size < _SMALLEST_VOCABULARY:
        raise UserError(
            f"vocab_size must be at least {_SMALLEST_VOCABULARY} "
            f"(256 bytes and the end-of-text token), got {vocab_size}"
        )
    bpe = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces = pre_tokenizers.Split(Regex(f".{{1,{_LONGEST_WORD}}}"), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, pieces])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.pre_tokenizer = words  # encoding a long word takes linear time
    ends = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **ends)


def load_tokenizer(path_or_id: str | Path) -> "PreTrainedTokenizerFast":
    """Load an existing tokenizer: a Hugging Face folder, or a hub id (which needs the network once).

    Raises:
        UserError: nothing loads from there, it has no fast version, or it has no end-of-text token.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        check_no_pointer(Path(path_or_id, "tokenizer.json"))
        tokenizer = AutoTokenizer.from_pretrained(str(path_or_id))
    except Exception as error:  # what the tokenizers library raises for a damaged file is no subclass
        raise UserError(
            f"tokenizer {path_or_id}: neither a folder with tokenizer.json nor a hub id that can be loaded: "
            f"{in_a_line(error)}"
        ) from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"tokenizer {path_or_id}: {type(tokenizer).__name__} has no fast version (tokenizer.json)")
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {path_or_id}: has no end-of-text token; set eos_token in its tokenizer_config.json")
    return tokenizer


def vocabulary_size(tokenizer: "PreTrainedTokenizerFast") -> int:
    """Return the largest token id plus one. A vocabulary with gaps has fewer tokens than that."""
    return int(max(tokenizer.get_vocab().values())) + 1


def check_vocabulary(given: str, known: int, needed: int) -> None:
    """Refuse a model, named `given`, that knows fewer token ids than its tokenizer has.

    Raises:
        UserError: the message gives both numbers and says what to do.
    """
    if known < needed:
        raise UserError(
            f"{given}: knows {known} tokens, its tokenizer has {needed}; resize the model to its tokenizer "
            f"(model.resize_token_embeddings({needed})) and save it, or take the added tokens out of the tokenizer"
        )


def for_prompts(tokenizer: "PreTrainedTokenizerFast") -> "PreTrainedTokenizerFast":
    """Return a tokenizer that appends nothing to a text, so that the text can be continued.

    Some tokenizers end every text with an end-of-text token. Tokens in front of a text stay.
    """
    probe = "a"
    text = tokenizer.encode(probe, add_special_tokens=False)
    whole = tokenizer.encode(probe)
    if not text or whole[-len(text) :] == text:
        return tokenizer
    starts = [start for start in range(len(whole)) if whole[start : start + len(text)] == text]
    before = whole[: starts[0]] if starts else []
    names = [str(name) for name in tokenizer.convert_ids_to_tokens(before)]
    prompting = copy.deepcopy(tokenizer)
    prompting.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=[*names, "$A"], special_tokens=list(dict(zip(names, before, strict=True)).items())
    )
    return prompting


class Encoder:
    """Encodes text as plain text: no special tokens added, none found in it.

    Its ids *represent* a text if they contain neither the unknown nor the end-of-text token, and decode
    to the same text, after the tokenizer's own normaliser on both sides. Spaces at the start of a document
    do not count, because SentencePiece-like tokenizers add one there.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a document is text like any other
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._reserved = {tokenizer.unk_token_id, tokenizer.eos_token_id} - {None}

    def encode(self, documents: Iterable[Document]) -> Iterator[list[int]]:
        """Yield the token ids of each document, without the closing end-of-text token.

        Raises:
            UserError: a document is not represented; the message names it and its first bad line.
        """
        for batch in _batches(documents):
            encoded = self._encoded([document.text for document in batch])
            for document, (ids, represented) in zip(batch, encoded, strict=True):
                if not represented:
                    raise UserError(self._complaint(document))
                yield ids

    def _encoded(self, texts: Sequence[str]) -> list[tuple[list[int], bool]]:
        """Return the ids of each text, and whether they represent it."""
        ids_of = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        decoded = self._tokenizer.decode_batch(ids_of, skip_special_tokens=False)
        return [
            (ids, self._reserved.isdisjoint(ids) and self._normal(back) == self._normal(text))
            for text, ids, back in zip(texts, ids_of, decoded, strict=True)
        ]

    def _normal(self, text: str) -> str:
        text = text.lstrip(" ")
        normalizer = self._tokenizer.normalizer
        return normalizer.normalize_str(text) if normalizer else text

    def _complaint(self, document: Document) -> str:
        lines = list(StringIO(document.text, newline="\n"))

        def is_bad(number: int) -> bool:  # the whole beginning, since what a token may hold need not end with a line
            return not self._encoded(["".join(lines[:number])])[0][1]

        number = 1 + bisect_left(range(1, len(lines)), True, key=is_bad)
        return (
            f"{document.name} (domain {document.domain}), line {number} of its text: the tokenizer cannot represent "
            f"{lines[number - 1][:_SHOWN_CHARACTERS]!r}; use a byte-level tokenizer, "
            f"or leave data.tokenizer out to train one"
        )


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Group documents so that a batch has about a million characters: parallel, yet small in memory."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
