"""What a saved model's folder holds beside the weights: tokenizer, generation settings, and a card that is true."""

import re

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoTokenizer, GenerationConfig

from duollm.convert.saving import Story, save_model
from tiny import tiny_model
from tiny_corpus import packed_corpus
from without_duollm import run_without_duollm


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return packed_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def saved(data, tmp_path_factory):
    story = Story(base_model="Owl-1B", license="apache-2.0").then("Distilled").then("Trained a little", data)
    model = tiny_model(vocab_size=data.vocab_size, skip_scope="layer")
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_model(model, data.tokenizer, folder, story)
    return folder, story


def test_the_card_says_what_was_done_on_what(saved, data):
    card = ModelCard.load(saved[0] / "README.md")
    assert (card.data.library_name, card.data.base_model, card.data.license) == (
        "transformers",
        "Owl-1B",
        "apache-2.0",
    )
    sizes = data.manifest["splits"]["train"]["owls"]
    assert "1. Distilled.\n2. Trained a little on the training documents of owls (" in card.text
    assert f"{sizes['documents']:,} documents, {sizes['tokens']:,} tokens); data {data.fingerprint}." in card.text
    assert "each of its 3 layers" in " ".join(card.text.lower().split())
    assert "leaves out the layer's attention" in card.text


def test_a_story_goes_on_from_a_saved_model(saved):
    folder, story = saved
    assert Story.read(folder) == story
    assert Story.read(folder).then("More").steps == (*story.steps, "More")


@pytest.mark.parametrize(
    ("card", "told"),
    [
        (None, Story()),
        ("# no header", Story()),
        ("---\nlicense: mit\n---\n# somebody's", Story(license="mit")),
        ("---\n[: broken\n---\n", Story()),
    ],
    ids=["no card", "no header", "somebody's", "broken"],
)
def test_other_cards_tell_what_they_can(tmp_path, card, told):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert Story.read(tmp_path) == told


def test_generation_knows_the_tokenizers_special_tokens(saved, data):
    settings, end = GenerationConfig.from_pretrained(saved[0]), data.end_of_text_id
    assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (end, end, end)
    assert AutoTokenizer.from_pretrained(saved[0]).decode(data.tokenizer("an owl")["input_ids"]) == "an owl"


def test_the_cards_code_runs_without_duollm(saved, tmp_path):
    [block] = re.findall(r"```python\n(.*?)```", (saved[0] / "README.md").read_text(), re.DOTALL)
    shown = run_without_duollm(f"{block}\nprint(model(**inputs).logits.double().sum().item())", saved[0], tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(saved[0])
    model = tiny_model(vocab_size=tokenizer.vocab_size, skip_scope="layer", attention="sdpa")
    expected = model(torch.tensor([tokenizer("The state of")["input_ids"]])).logits.double().sum().item()
    assert float(shown) == pytest.approx(expected, abs=1e-3)
