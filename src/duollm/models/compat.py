"""What passes between the duo and transformers: the names that versions differ in, keywords, masks and outputs.

Since 5.24 the cache is called `cache`, before that `past_key_values`. The duo takes and offers it under both names.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import TransformersKwargs

CACHE = "cache" if "cache" in BaseModelOutputWithPast.__annotations__ else "past_key_values"
"""The name under which this version of transformers hands on the cache."""

_OTHER_NAME = "past_key_values" if CACHE == "cache" else "cache"

_MASKS: dict[str, Callable[..., Any]] = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
}

# What transformers' decorators and attention functions read, continuous batching's included.
_KNOWN = TransformersKwargs.__annotations__.keys() - {"output_router_logits"} | {
    *("return_dict", "debug_io", "debug_io_dir", "prune_layers"),
    *("cache", "read_index", "write_index", "block_table", "logits_indices", "logits_processor_args"),
    *("max_seqlen_q", "max_seqlen_k"),
}
_LOSS_KEYWORDS = {"num_items_in_batch", "ignore_index", "shift_labels"}


_TWICE = "cache and past_key_values are two names of one argument; give one of them"


class BothCacheNames:
    """Makes the cache in an output readable under both names, without the deprecation warning that 5.24 has."""

    if TYPE_CHECKING:
        cache: Any
        past_key_values: Any
    elif CACHE == "cache":

        @property
        def past_key_values(self) -> Any:
            """The cache under its name before 5.24."""
            return self.cache

        def _replace_old_cache_name(self, key: str) -> str:
            return _current_name(key)
    else:

        @property
        def cache(self) -> Any:
            """The cache under its name since 5.24."""
            return self.past_key_values

        def __getitem__(self, key: Any) -> Any:
            return super().__getitem__(_current_name(key))

        def __setitem__(self, key: Any, value: Any) -> None:
            super().__setitem__(_current_name(key), value)

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(_current_name(name), value)

        def __contains__(self, key: Any) -> bool:
            return super().__contains__(_current_name(key))

        def get(self, key: Any, default: Any = None) -> Any:
            """As of a dictionary."""
            return super().get(_current_name(key), default)


def _current_name(key: Any) -> Any:
    return CACHE if key == _OTHER_NAME else key


@dataclass
class DuoModelOutput(BothCacheNames, BaseModelOutputWithPast):
    """`choices`: per layer what the policy chose, branches [B, T] or weights of the branches [B, T, C]."""

    choices: tuple[Tensor, ...] | None = None


@dataclass
class DuoCausalLMOutput(BothCacheNames, CausalLMOutputWithPast):
    """`choices`: per layer what the policy chose, branches [B, T] or weights of the branches [B, T, C]."""

    choices: tuple[Tensor, ...] | None = None

    @property
    def routes(self) -> Tensor:
        """The routes taken, integers [B, T, L], values of `Branch`; soft choices count as their largest weight."""
        assert self.choices is not None
        hard = [choice.argmax(-1) if choice.is_floating_point() else choice for choice in self.choices]
        return torch.stack(hard, dim=-1)


def only_cache(cache: Any, past_key_values: Any, keywords: dict[str, Any]) -> Any:
    """Return the cache, which may be given under either name.

    Before 5.24 continuous batching gives its paged cache as `cache`, meant for the attention function alone.
    """
    if cache is None:
        return past_key_values
    if past_key_values is not None:
        raise ValueError(_TWICE)
    if CACHE == "cache" or isinstance(cache, Cache):
        return cache
    keywords["cache"] = cache
    return None


def with_current_cache_name(keywords: dict[str, Any]) -> dict[str, Any]:
    """Return keywords for `generate`, which knows the cache under one of its names only."""
    if keywords.get(_OTHER_NAME) is not None and keywords.get(CACHE) is not None:
        raise ValueError(_TWICE)
    given = keywords.get(_OTHER_NAME)
    others = {name: value for name, value in keywords.items() if name != _OTHER_NAME}
    return others if given is None else others | {CACHE: given}


def update_cache(
    cache: Any, key: Tensor, value: Tensor, layer_idx: int, keywords: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Add keys and values to a layer of the cache and return all that the layer may attend to."""
    if CACHE == "cache":  # a paged cache changes what the attention function is given
        return cache.update(key, value, layer_idx, kwargs=keywords)
    return cache.update(key, value, layer_idx)


def make_mask(kind: str, config: Any, embedded_BTD: Tensor, cache: Any, **given: Any) -> Any:
    """What layers of one kind may attend to, in the form that the attention function wants."""
    like_BTD = embedded_BTD.to(compute_dtype(embedded_BTD))  # a mask is added to scores of that type
    return _MASKS[kind](config, inputs_embeds=like_BTD, **{CACHE: cache}, **given)


def compute_dtype(states: Tensor) -> torch.dtype:
    """The type that matrix products will use: cast once here, not once per product under autocast."""
    device = states.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # autocast does not know the meta device
        return states.dtype
    return torch.get_autocast_dtype(device)


def refuse_unknown(owner: object, keywords: dict[str, Any], receiver: Callable[[], Callable[..., Any]]) -> None:
    """Raise a TypeError for keywords that neither transformers nor the function that receives them knows.

    `receiver` returns that function; finding it takes time that every decoded token would pay.
    """
    unknown = [name for name in keywords if name not in _KNOWN]
    if unknown:
        received = inspect.signature(receiver()).parameters
        unknown = [name for name in unknown if name not in received]
    if unknown:
        names = ", ".join(map(repr, sorted(unknown)))
        raise TypeError(f"{type(owner).__name__}.forward() got unexpected keyword arguments: {names}")


def pop_loss_keywords(keywords: dict[str, Any], loss_function: Callable[..., Any]) -> dict[str, Any]:
    """Take the loss function's keywords out of the others; a user's own function may have keywords of its own."""
    names = [name for name in keywords if name in _LOSS_KEYWORDS]
    if any(name not in _KNOWN for name in keywords):
        own = inspect.signature(loss_function).parameters
        names += [name for name in keywords if name in own and name not in names]
    return {name: keywords.pop(name) for name in names}


def without_values(tensor: Tensor) -> bool:
    """Whether a tensor cannot be read: it is on the meta device, fake, or part of a graph that is being traced."""
    return tensor.is_meta or torch.compiler.is_compiling() or isinstance(tensor, FakeTensor)


def checkpoint_nested(checkpoint: Callable[..., Any], function: Callable[..., Any], *inputs: Any) -> Any:
    """Checkpoint a function of nested tensors: through a reentrant checkpoint gradients flow at the top level only."""
    leaves, structure = tree_flatten(inputs)
    found = []

    def flat(*leaves: Any) -> tuple[Any, ...]:
        outputs, output_structure = tree_flatten(function(*tree_unflatten(leaves, structure)))
        found.append(output_structure)
        return tuple(outputs)

    outputs = checkpoint(flat, *leaves)
    return tree_unflatten(outputs, found[0])


def hidden_to_keep(hidden_BTD: Tensor, keep: Any) -> Tensor:
    """The hidden states whose logits are wanted, by what `logits_to_keep` means in transformers.

    Args:
        hidden_BTD: all of them.
        keep: the last so many (0: all); a slice; positions [K] or [B, K]; or a mask [T] or [B, T], which with a
            batch dimension flattens the result to [number of True, D].
    """
    if isinstance(keep, (int, slice)):  # not int | slice, which torch 2.8 cannot trace
        return hidden_BTD[:, slice(-keep, None) if isinstance(keep, int) else keep]
    keep = torch.as_tensor(keep, device=hidden_BTD.device)
    if keep.ndim == 1 and not keep.is_floating_point():
        return hidden_BTD[:, keep]
    batch, tokens = hidden_BTD.shape[:2]
    if keep.dtype == torch.bool and keep.shape == (batch, tokens):
        return hidden_BTD[keep]
    if keep.ndim == 2 and len(keep) == batch and keep.dtype in (torch.int64, torch.int32):
        return torch.take_along_dim(hidden_BTD, keep.long()[..., None], dim=1)
    raise ValueError(
        f"logits_to_keep must be a number, positions of shape [K] or [{batch}, K], or a mask of shape [{batch}, "
        f"{tokens}], got {keep.dtype} of shape {list(keep.shape)}"
    )
