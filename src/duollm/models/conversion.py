"""Dense checkpoints in, dense checkpoints out: a duo whose big FFNs are the FFNs of a dense model."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .branch import Branch
from .configuration_duo import DuoConfig
from .families import dense_config, duo_config, duo_name, family_of
from .modeling_duo import DuoForCausalLM

_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
"""Without these transformers would build a model of billions of parameters."""

_WRONG_TYPES = (TypeError, AttributeError, StrictDataclassError)
_DAMAGE = (OSError, ValueError, LookupError, ArithmeticError, RecursionError, *_WRONG_TYPES)
"""What transformers raises for a configuration that is damaged, or holds a value that is not allowed."""

_NO_REAL_NUMBERS = ("I", "U", "BOOL", "C")
"""How safetensors' names of such types begin: transformers would cast quantised weights without their scales."""


def from_dense(
    cls: type[DuoForCausalLM],
    dense: PreTrainedModel | str | os.PathLike[str],
    small_intermediate_size: int,
    skip_scope: str = "ffn",
    dtype: torch.dtype | str | None = None,
    **options: Any,
) -> DuoForCausalLM:
    """See `DuoForCausalLM.from_dense`."""
    model = dense if isinstance(dense, PreTrainedModel) else None
    config = read_dense_config(cast(Any, dense), **options) if model is None else model.config
    source: dict[str, Any]
    if model is None:
        source = {"pretrained_model_name_or_path": dense, "dtype": dtype or "auto"}
    else:
        copied = {name: value.detach().clone() for name, value in model.state_dict().items()}
        source = {"pretrained_model_name_or_path": None, "state_dict": copied, "dtype": dtype or model.dtype}
    duo = _load(cls, config, duo_config(config, small_intermediate_size, skip_scope), **source, **options)
    if model is not None:
        duo.generation_config = deepcopy(model.generation_config)
    return duo


def to_dense(duo: DuoForCausalLM, routes: str | int | Sequence[int] | Tensor = "big") -> PreTrainedModel:
    """See `DuoForCausalLM.to_dense`."""
    branch = _only_branch(routes, duo.config.num_hidden_layers)
    config, family = dense_config(duo.config, branch), family_of(duo.config.dense_family)
    dense_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        names = list(dense_class(config).state_dict())
    part, weights = f".mlp.{branch.name.lower()}.", duo.state_dict()
    chosen = {name: weights[duo_name(family, name).replace(".mlp.big.", part)].clone() for name in names}
    with _quiet():
        dense = dense_class.from_pretrained(None, config=config, state_dict=chosen, dtype=duo.dtype)
    dense.generation_config = deepcopy(duo.generation_config)
    return cast(PreTrainedModel, dense)


def read_dense_config(folder_or_id: str | os.PathLike[str], **options: Any) -> PreTrainedConfig:
    """Read the configuration of a dense model; code that comes with it is never run.

    Raises:
        ValueError: there is none, it is damaged, or it is of a family that is not supported.
    """
    config_file = Path(folder_or_id, options.get("subfolder") or "", "config.json")
    try:
        if Path(folder_or_id).exists() and not config_file.is_file():  # transformers would take it for an empty one
            raise FileNotFoundError(config_file)
        given, _ = PreTrainedConfig.get_config_dict(folder_or_id, **options)
    except _DAMAGE as error:
        if isinstance(error, OSError) and not os.path.isfile(config_file):
            fault = "is no folder with a config.json, nor a model on the hub that can be reached"
        else:
            fault = f"has a config.json that cannot be read ({_in_a_line(error)}); fetch it again"
        raise ValueError(f"{folder_or_id} {fault}") from error
    if not isinstance(given, dict):
        raise ValueError(f"{folder_or_id} has a config.json that cannot be read (it is no mapping); fetch it again")
    family_of(given.get("model_type"))
    missing = [name for name in _SIZES if given.get(name) is None]
    if missing:
        raise ValueError(f"{folder_or_id} has a config.json without {', '.join(missing)}; fetch it again")
    try:
        config = CONFIG_MAPPING[given["model_type"]].from_dict(given)
        config.to_dict()
    except _DAMAGE as error:
        fault = f"holds a value that is not allowed ({_in_a_line(error)}); correct it there"
        raise ValueError(f"config.json of {folder_or_id} {fault}") from error
    return config


def _check_generation_file(file: Path) -> None:
    """Refuse settings of generation that transformers would leave out without a word, or stumble over."""
    try:
        if file.is_file() and not isinstance(json.loads(file.read_text(encoding="utf-8")), dict):
            raise TypeError("it is no mapping")
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read ({_in_a_line(error)}); fetch it again, or delete it") from error


def _check_weights(folder: Path) -> None:
    """Find damaged or missing files of a local checkpoint; transformers would raise whatever they lead it to."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    files = [single]
    if not single.is_file() and index.is_file():
        try:
            content = json.loads(index.read_text(encoding="utf-8"))
            files = sorted({folder / name for name in content["weight_map"].values()})
            _ = files[0], content["metadata"]["total_size"]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{index} is damaged: it must hold a weight_map and metadata with total_size; fetch it again"
            ) from error
    for file in files if single.is_file() or index.is_file() else []:
        if not file.is_file():
            raise ValueError(f"{file}, which {index.name} names, is missing; fetch it")
        with file.open("rb") as opened:
            if opened.read(23) == b"version https://git-lfs":
                raise ValueError(f"{file} is a Git LFS pointer, not the weights; run `git lfs pull` in that folder")
        try:
            with safe_open(file, "pt") as weights:
                types = {name: weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{file} is no whole safetensors file ({error}); fetch it again") from error
        for name, kind in types.items():
            if name.endswith((".weight", ".bias")) and kind.startswith(_NO_REAL_NUMBERS):
                raise ValueError(f"{file} holds {name} as {kind}; give the checkpoint in floating-point numbers")


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _load(cls: type[DuoForCausalLM], dense: PreTrainedConfig, config: DuoConfig, **source: Any) -> DuoForCausalLM:
    """Load dense weights under the duo's names; small FFNs get their random start."""
    if source["pretrained_model_name_or_path"] is not None:
        folder = Path(source["pretrained_model_name_or_path"], source.get("subfolder") or "")
        _check_generation_file(folder / "generation_config.json")
        _check_weights(folder)
    renamed = {re.escape(dense_part): duo_part for dense_part, duo_part in family_of(dense.model_type).weights.items()}
    try:
        with _quiet():
            model, loading = cast(Any, cls).from_pretrained(
                config=config,
                key_mapping=renamed,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused in fewer words below
                **source,
            )
    except OSError as error:
        raise ValueError(
            f"{source['pretrained_model_name_or_path']} holds no safetensors that can be read; other files are not "
            "opened: load the model with transformers and pass that"
        ) from error
    _check_complete(loading)
    try:  # transformers loads settings that it refuses to save
        model.generation_config.validate(strict=True)
    except ValueError as error:
        raise ValueError(f"its generation_config.json is not allowed ({_in_a_line(error)}); correct it") from error
    _check_finite(model)
    del model._weight_conversions  # else save_pretrained would write the dense model's names
    return cast(DuoForCausalLM, model)


def _check_complete(loading: dict[str, Any]) -> None:
    """Every weight of the checkpoint is used, and only small FFNs start at random."""
    unused = sorted(loading["unexpected_keys"])
    missing = sorted(name for name in loading["missing_keys"] if ".mlp.small." not in name)
    wrong = sorted(f"{name} {list(found)}, not {list(wanted)}" for name, found, wanted in loading["mismatched_keys"])
    for problem, names in (
        ("holds weights that the duo has no place for", unused),
        ("holds weights of a shape that its configuration does not give", wrong),
        ("lacks weights", missing),
    ):
        if names:
            raise ValueError(f"the checkpoint {problem}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}")


def _check_finite(model: PreTrainedModel) -> None:
    """A single NaN spoils every output; a sum in float32 finds it in one reading of the weights."""
    for name, weight in model.named_parameters():
        if not weight.is_meta and not weight.detach().sum(dtype=torch.float32).isfinite():
            raise ValueError(f"the checkpoint's {name} holds NaN or infinity; fetch or train it again")


def _only_branch(routes: str | int | Sequence[int] | Tensor, num_layers: int) -> Branch:
    """The branch that all layers take, or a ValueError that says why there is no dense model."""
    if isinstance(routes, str):
        routes = {branch.name.lower(): branch.value for branch in Branch}.get(routes, -1)
    given = torch.as_tensor(routes)
    taken = set(given.flatten().tolist())
    if given.shape not in ((), (num_layers,)) or not taken <= set(Branch):
        raise ValueError(f"routes must be 'big', 'small' or a branch for each of {num_layers} layers, got {routes!r}")
    if len(taken) > 1:
        raise ValueError("a dense model has one FFN size for all layers: only all big or all small can be exported")
    if taken == {Branch.SKIP}:
        raise ValueError("a dense model has an FFN in every layer: only all big or all small can be exported")
    return Branch(taken.pop())


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers reports every small FFN as missing; what is really missing is refused here."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
