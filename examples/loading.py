"""What the examples start from: a model folder with its tokenizer, or a tiny random model that reads bytes."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from duollm import DuoConfig, DuoForCausalLM

TEXT = """def mean(values):
    total = 0
    for value in values:
        total += value
    return total / len(values)
"""


class Bytes:
    """A tokenizer without a vocabulary: a token is a byte."""

    def encode(self, text: str) -> list[int]:
        """Return the bytes of a text."""
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        """Return the text of bytes."""
        return bytes(ids).decode(errors="replace")


def load(folder: Path | None) -> tuple[DuoForCausalLM, Any]:
    """Return the model of a folder (such as runs/quick/model) and its tokenizer; None: a random one."""
    if folder is not None:
        return DuoForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    config = DuoConfig(vocab_size=256, hidden_size=32, num_hidden_layers=4, intermediate_size=128)
    return DuoForCausalLM(config).eval(), Bytes()
