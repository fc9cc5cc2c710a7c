"""Loading a saved duo, checked."""

from pathlib import Path
from typing import Any, Literal

import torch
from transformers.utils import logging

from duollm.errors import UserError
from duollm.models.modeling_duo import DuoForCausalLM


def load_model(folder: Path, dtype: torch.dtype | Literal["auto"] = torch.float32) -> DuoForCausalLM:
    """Load a saved duo in evaluation mode, as `dtype` ("auto": the one it was saved in).

    Weights that are saved in that type are mapped from the file, not copied.

    Raises:
        UserError: the folder is missing, is no duo, or its weights are damaged.
    """
    load: Any = DuoForCausalLM.from_pretrained  # it returns a pair when asked to, which its type does not say
    model: DuoForCausalLM
    try:
        model, found = load(folder, dtype=dtype, local_files_only=True, output_loading_info=True)
        reason = _mismatch(found)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
    if reason:
        raise UserError(f"{folder}: not a readable duo model ({reason}); train one with `duollm pretrain`")
    return model.eval()


def silence_transformers() -> None:
    """The verbs say what happens; progress bars of loading and saving, and reports of a bad file, are noise."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _mismatch(found: dict[str, Any]) -> str:
    """Name a weight that the model lacks or does not know; transformers would fill it in at random, or ignore it."""
    for key, complaint in (("missing_keys", "lacks the weight"), ("unexpected_keys", "does not know the weight")):
        if found[key]:
            return f"it {complaint} {sorted(found[key])[0]}"
    return ""
