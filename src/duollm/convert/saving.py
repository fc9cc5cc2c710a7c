"""Saves and loads a model as a Hugging Face folder: weights, code, tokenizer, generation settings and card."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers.utils import logging
from yaml import YAMLError

from duollm.data.packed import PackedData
from duollm.errors import UserError
from duollm.files import read_json, replacing, write_text
from duollm.models.configuration_duo import DuoConfig
from duollm.models.modeling_duo import DuoForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CARD = "README.md"

_TEXT = """# {title}

A decoder language model that can spend its compute token by token. Each of its {layers} layers holds a big FFN (inner
width {big}) and a small one ({small}); every token takes one of them, or none, at every layer. A *route* says which:
one number per layer, 0 skip, 1 small, 2 big. {skip}

## How it was made

{steps}

## How to use it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its name on the hub
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer("The state of", return_tensors="pt")
model(**inputs).logits  # all big
model(**inputs, routes={route}).logits  # a route for all tokens, or integers [B, T, {layers}]
model.generate(**inputs, routes={route}, max_new_tokens=40)
```

The folder carries the model's code (`modeling_duo.py` and what it imports), so `duollm` need not be installed; after
`import duollm`, `trust_remote_code` can be left out. Trained routers are not in the folder: with `duollm` installed,
`duollm.routers.policies.parse_policy("router:FOLDER", model)` reads one, and `model.attach(router)` puts it in force
for `forward` and `generate`.
"""

_SKIP = {
    "ffn": "A token that skips still takes part in the layer's attention.",
    "layer": "A token that skips leaves out the layer's attention too; later tokens still attend to it.",
}


@dataclass(frozen=True)
class History:
    """How a model was made, for its card.

    Attributes:
        steps: one sentence per step, in order.
        base_model: the dense model that it was converted from.
        license: license of the weights, as the hub spells it; None if it is not known.
    """

    steps: tuple[str, ...] = ()
    base_model: str | None = None
    license: str | None = None

    def then(self, step: str, data: PackedData | None = None) -> "History":
        """Return the history with one more step, which used the training split of `data`."""
        if data:
            counted = data.manifest["splits"]["train"]
            texts = " and ".join(
                f"{each['domain']} ({each['origin']}: {counted[each['domain']]['documents']:,} documents, "
                f"{counted[each['domain']]['tokens']:,} tokens)"
                for each in data.manifest["sources"]
            )
            step = f"{step} on the training documents of {texts}; data {data.fingerprint}"
        return replace(self, steps=(*self.steps, step))

    @classmethod
    def read(cls, folder: Path) -> "History":
        """Return the history in the card of a model folder, as far as the card has one."""
        if not (folder / CARD).is_file():
            return cls()
        try:
            header = ModelCard.load(folder / CARD, ignore_metadata_errors=True).data
        except (ValueError, YAMLError):  # somebody else's, without a readable header
            return cls()
        ours = header.get("duollm")
        steps = ours.get("steps") if isinstance(ours, dict) else None
        return cls(tuple(steps or ()), header.get("base_model"), header.get("license"))


def save_model(model: DuoForCausalLM, tokenizer: "PreTrainedTokenizerBase", folder: Path, history: History) -> None:
    """Write everything that transformers' auto classes need to load the model, and a card with `history`."""
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(model.generation_config, token) is None:
            setattr(model.generation_config, token, getattr(tokenizer, token))
    with replacing(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_text(temporary / CARD, _card(model, history))


def is_duo(folder: Path) -> bool:
    """Return whether a folder holds a saved duo, by its config.json."""
    try:
        settings = read_json(folder / "config.json")
    except (OSError, ValueError):  # what reads a dense model says what is wrong
        return False
    return isinstance(settings, dict) and settings.get("model_type") == DuoConfig.model_type


def load_model(folder: Path, dtype: torch.dtype | Literal["auto"] = torch.float32) -> DuoForCausalLM:
    """Load a saved duo in evaluation mode, in type `dtype` ("auto": the type it was saved in).

    Weights that are saved in that type are mapped from the file, not copied.

    Raises:
        UserError: the folder is missing, holds no duo, or its weights are damaged.
    """
    load: Any = DuoForCausalLM.from_pretrained  # it returns a pair when asked to, which its type does not say
    model: DuoForCausalLM
    try:
        model, found = load(folder, dtype=dtype, local_files_only=True, output_loading_info=True)
        # transformers would fill in a missing weight at random, and ignore an unexpected one
        wrong = {"lacks the weight": found["missing_keys"], "does not know the weight": found["unexpected_keys"]}
        reason = next((f"it {complaint} {min(keys)}" for complaint, keys in wrong.items() if keys), "")
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        reason = str(error).strip().split("\n")[0]
    if reason:
        raise UserError(f"{folder}: not a readable duo model ({reason}); train one with `duollm pretrain`")
    return model.eval()


def silence_transformers() -> None:
    """The verbs say what happens; progress bars of loading and saving, and reports of a bad file, are noise."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _card(model: DuoForCausalLM, history: History) -> str:
    config, parameters = model.config, sum(each.numel() for each in model.parameters())
    header = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["duo-llm", "adaptive-computation"],
        base_model=history.base_model,
        license=history.license,
        duollm={"steps": list(history.steps)},
    )
    layers, of = config.num_hidden_layers, f"{history.base_model}, " if history.base_model else ""
    text = _TEXT.format(
        title=f"Duo model of {of}{parameters / 1e6:,.1f} M parameters",
        layers=layers,
        big=config.intermediate_size,
        small=config.small_intermediate_size,
        skip=_SKIP[config.skip_scope],
        steps="\n".join(f"{number}. {step}." for number, step in enumerate(history.steps, 1)) or "Not recorded.",
        route=f"[1] * {layers - layers // 2} + [2] * {layers // 2}",
    )
    return f"---\n{header.to_yaml()}\n---\n{text}"
