"""A folder of short texts, for tests that need documents."""

from pathlib import Path

import numpy as np

from duollm.config import DataConfig
from duollm.data.packed import PackedData
from duollm.data.packing import prepare_data

WORDS = ["the", "cat", "sat", "on", "a", "mat", "while", "seven", "grey", "owls", "read", "émile's", "東京", "aloud"]


def write_corpus(folder: Path, documents: int = 20, seed: int = 0) -> Path:
    """A folder of different short texts of 60, 120 or 180 words."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(documents):
        drawn = random.choice(WORDS, 60 * (1 + index % 3))
        lines = [" ".join(drawn[start : start + 10]) for start in range(0, len(drawn), 10)]
        (folder / f"{index:02}.txt").write_text(f"text {index}\n" + "\n".join(lines), encoding="utf-8")
    return folder


def packed_corpus(folder: Path) -> PackedData:
    """Such texts as the domain `owls`, packed into sequences of 16 tokens."""
    config = DataConfig(domains=[str(write_corpus(folder / "owls"))], vocab_size=300, sequence_length=16)
    return prepare_data(config, seed=0, folder=folder / "data")
