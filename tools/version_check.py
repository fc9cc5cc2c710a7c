"""One small check of an installation: prints a hash that must be equal on all versions of torch and transformers.

A toy duo with fixed weights generates under all big, under mixed routes and under an attached router, with cache and as
a loop without one; it is saved, loaded and asked again. Exit status 1 with one line if any two of these differ.
"""

import hashlib
import json
import logging
import sys
import tempfile
import warnings

import numpy as np
import torch
import transformers
from torch import Tensor

from duollm import Branch, DuoConfig, DuoForCausalLM
from duollm.routers.linear import LinearRouter

ROUTES = torch.tensor([Branch.BIG, Branch.SMALL, Branch.SKIP, Branch.BIG])
NEW_TOKENS = 12


def toy(skip_scope: str) -> DuoForCausalLM:
    """A duo whose weights come from numpy: no version of torch or transformers draws them."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "small_intermediate_size": 16, "num_hidden_layers": 4}
    config = DuoConfig(
        vocab_size=97,
        num_attention_heads=4,
        num_key_value_heads=2,
        **sizes,
        skip_scope=skip_scope,
        tie_word_embeddings=False,
    )
    model = DuoForCausalLM(config).eval()
    fill(model)
    return model


def fill(module: torch.nn.Module) -> None:
    """Give every matrix weights that depend on its shape and order alone."""
    numbers = np.random.default_rng(0)
    with torch.no_grad():
        for _, weight in sorted(module.named_parameters()):
            if weight.ndim == 2:
                weight.copy_(torch.from_numpy(numbers.standard_normal(weight.shape) / weight.shape[1] ** 0.5))


def loop(model: DuoForCausalLM, prompt_BT: Tensor, **given: Tensor) -> Tensor:
    """Greedy decoding, everything computed anew for each token."""
    for _ in range(NEW_TOKENS):
        logits = model(prompt_BT, use_cache=False, **given).logits[:, -1]
        prompt_BT = torch.cat([prompt_BT, logits.argmax(-1)[:, None]], dim=-1)
    return prompt_BT


def check(skip_scope: str) -> list[list[int]]:
    """Compare and return the generated tokens under all big, mixed routes and a router."""
    model = toy(skip_scope)
    router = LinearRouter(model.config, tuple(Branch)).eval()
    fill(router)
    prompt_BT = torch.from_numpy(np.random.default_rng(1).integers(3, 97, (2, 9)))
    greedy = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    tokens = []
    for name, policy, given in (
        ("all big", None, {}),
        ("mixed routes", None, {"routes": ROUTES}),
        ("router", router, {}),
    ):
        model.attach(policy)
        ids_BT = model.generate(prompt_BT, attention_mask=torch.ones_like(prompt_BT), **greedy, **given)
        if not torch.equal(ids_BT, loop(model, prompt_BT, **given)):
            sys.exit(f"{name}, skip_scope {skip_scope}: generating with a cache differs from a loop without one")
        tokens += ids_BT.tolist()
    model.attach(None)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = DuoForCausalLM.from_pretrained(folder).eval()
        if not torch.equal(loaded(prompt_BT).logits, model(prompt_BT).logits):
            sys.exit(f"skip_scope {skip_scope}: the model differs after saving and loading")
    return tokens


class Kept(logging.Handler):
    """Keeps what transformers logs, which is how it warns."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Called for each message."""
        self.messages.append(record.getMessage())


def main() -> None:
    """Print the hash, the versions and every warning, as one line of JSON."""
    kept = Kept()
    logging.getLogger("transformers").addHandler(kept)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tokens = check("ffn") + check("layer")
    found = {
        "hash": hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:12],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "warnings": sorted(
            {message.split("\n")[0] for message in [*kept.messages, *(str(each.message) for each in caught)]}
        ),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
