"""A folder of short texts, for tests that need documents."""

from pathlib import Path

import numpy as np

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
