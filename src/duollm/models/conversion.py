"""Dense checkpoints in: a duo whose big FFNs are the FFNs of a dense model."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .families import duo_config, family_of
from .modeling_duo import DuoForCausalLM

Dense = PreTrainedModel | str | os.PathLike[str]


def from_dense(
    cls: type[DuoForCausalLM],
    dense: Dense,
    small_intermediate_size: int,
    skip_scope: str = "ffn",
    dtype: torch.dtype | str | None = None,
    **options: Any,
) -> DuoForCausalLM:
    """See `DuoForCausalLM.from_dense`."""
    config = dense.config if isinstance(dense, PreTrainedModel) else _read_config(dense, **options)
    duo = duo_config(config, small_intermediate_size=small_intermediate_size, skip_scope=skip_scope)
    weights = family_of(config.model_type).weights
    source: dict[str, Any] = {"pretrained_model_name_or_path": dense, "dtype": dtype or "auto", **options}
    if isinstance(dense, PreTrainedModel):
        copied = {name: value.detach().clone() for name, value in dense.state_dict().items()}
        source |= {"pretrained_model_name_or_path": None, "state_dict": copied, "dtype": dtype or dense.dtype}
    with _quiet():
        model, loading = cast(Any, cls).from_pretrained(
            config=duo,
            key_mapping={re.escape(dense_part): duo_part for dense_part, duo_part in weights.items()},
            use_safetensors=True,
            output_loading_info=True,
            **source,
        )
    _check_complete(loading)
    del model._weight_conversions  # else save_pretrained would write the dense model's names
    if isinstance(dense, PreTrainedModel):
        model.generation_config = dense.generation_config
    return model


def _read_config(folder_or_id: str | os.PathLike[str], **options: Any) -> PreTrainedConfig:
    """The dense model's configuration; never runs code that comes with it."""
    given, _ = PreTrainedConfig.get_config_dict(folder_or_id, **options)
    family_of(given.get("model_type"))
    return CONFIG_MAPPING[given["model_type"]].from_dict(given)


def _check_complete(loading: dict[str, Any]) -> None:
    """Every weight of the checkpoint is used, and only small FFNs start at random."""
    unused = sorted(loading["unexpected_keys"])
    missing = sorted(name for name in loading["missing_keys"] if ".mlp.small." not in name)
    for problem, names in (("holds weights that the duo has no place for", unused), ("lacks weights", missing)):
        if names:
            raise ValueError(f"the checkpoint {problem}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}")


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers reports every small FFN as missing; what is really missing is refused here."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
