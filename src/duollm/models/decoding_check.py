"""Checks, once per process, that the installed transformers decodes with a cache as it does without one.

`generate` and a model agree on names and meanings of what passes between them, and a release of transformers may change
either. Then a model can start an empty cache at every step and write nonsense without an error. A toy shows it.
"""

from functools import cache
from typing import Any

import torch
import transformers

from .configuration_duo import DuoConfig

NEWEST_TESTED = "5.24.0"
_TOLERANCE = 1e-3


def check_cached_decoding(model: Any) -> None:
    """Raise a RuntimeError of one line if a toy of the model's class decodes differently with a cache."""
    kind: Any = type(model)
    if not getattr(model, "is_toy", False):
        _check(kind)


@cache
def _check(kind: Any) -> None:
    difference = _difference(kind)
    if not difference < _TOLERANCE:
        raise RuntimeError(
            f"with transformers {transformers.__version__} generating with a cache differs from generating without one "
            f"(logits by {difference:.2g}); install one that duollm was tested with: pip install "
            f"'transformers<={NEWEST_TESTED}', or give use_cache=False"
        )


def _difference(kind: Any) -> float:
    """The largest difference between a toy's logits while it generates and those of one pass over the whole text."""
    config = DuoConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        small_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=1,
        initializer_range=1.0,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad(), torch.autocast("cpu", enabled=False):
        torch.manual_seed(0)
        toy = kind(config).float().eval()
        toy.is_toy = True
        prompt_BT = torch.arange(6).view(2, 3)
        found = toy.generate(
            prompt_BT,
            attention_mask=torch.ones_like(prompt_BT),
            max_new_tokens=3,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        whole_BTV = toy(found.sequences, use_cache=False).logits[:, 2:-1]
        return float((torch.stack(found.logits, dim=1) - whole_BTV).abs().max())
