"""A tiny duo with a tokenizer, saved, and texts that it can read: for tests of whole commands."""

from pathlib import Path

import yaml

from duollm.config import DataConfig
from duollm.data.corpora import find_corpus
from duollm.data.packing import prepare_data
from duollm.data.tokenizer import train_tokenizer
from duollm.models.modeling_duo import DuoForCausalLM
from tiny import tiny_model
from tiny_corpus import write_corpus


def save_tiny(folder: Path) -> tuple[DuoForCausalLM, Path]:
    """Write `folder/model` and the texts `folder/owls`; return the model and the folder of the texts."""
    texts = write_corpus(folder / "owls", documents=40)
    tokenizer = train_tokenizer((document.text for document in find_corpus(str(texts)).documents()), 300)
    model = tiny_model(vocab_size=300)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return model, texts


def save_tiny_run(folder: Path) -> None:
    """Write what `save_tiny` writes, and a run folder `folder/run` around it, with the data packed."""
    _, texts = save_tiny(folder)
    data = DataConfig(domains=[str(texts)], tokenizer=str(folder / "model"), sequence_length=16, test_share=0.3)
    prepare_data(data, 5, folder / "run" / "data")
    recipe = {"seed": 5, "model": {"path": str(folder / "model")}, "data": data.model_dump()}
    (folder / "run" / "config.yaml").write_text(yaml.safe_dump(recipe))
