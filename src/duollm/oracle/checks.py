"""Refuses what a search cannot do before it starts, and says what is allowed."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from duollm.models.attention import DuoAttention
from duollm.models.configuration_duo import DuoConfig
from duollm.models.ffn import is_plain, is_watched
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.oracle.budgets import Budget, OnAverage
from duollm.oracle.contexts import CONTEXTS
from duollm.oracle.reductions import Reduction
from duollm.oracle.tree import decoder_layers
from duollm.oracle.trial import Method
from duollm.routes.space import RouteSpace


def check_search(model: DuoForCausalLM, input_ids: Tensor, space: RouteSpace, context: str) -> None:
    """Raise a ValueError that says what is allowed, if the search cannot be done."""
    if not (hasattr(model, "lm_head") and hasattr(getattr(model, "model", None), "layers")):
        raise ValueError(
            f"a search takes a DuoForCausalLM, got {type(model).__name__}; give the model inside: of PEFT's "
            "get_base_model(), of DataParallel and DDP the attribute module"
        )
    config = model.config
    _check_untouched(model)
    if context not in CONTEXTS:
        raise ValueError(f"context must be one of {', '.join(CONTEXTS)}, got {context!r}")
    if space.num_layers != config.num_hidden_layers:
        raise ValueError(
            f"the route space has {space.num_layers} layers, the model {config.num_hidden_layers}; make them equal"
        )
    if not isinstance(input_ids, Tensor) or input_ids.is_floating_point():
        raise ValueError(f"input_ids must be a tensor of integers, got {getattr(input_ids, 'dtype', type(input_ids))}")
    if input_ids.ndim != 2 or input_ids.shape[1] < 2 or not len(input_ids):
        raise ValueError(f"input_ids must be [B, T] with B >= 1 and T >= 2, got shape {list(input_ids.shape)}")
    least, most = torch.stack(input_ids.aminmax()).tolist()
    if least < 0 or most >= config.vocab_size:
        raise ValueError(f"token ids must be in 0 .. {config.vocab_size - 1}, got {least} .. {most}")
    if any(_draws(part) for part in model.modules()):  # an adapter's part may be in training mode alone
        raise ValueError("a search needs a model without dropout; call model.eval() first")
    if not getattr(config, "is_causal", True):
        raise ValueError("a search needs causal attention: config.is_causal must be True, got False")
    longest = _longest(config, context)
    if longest is not None and input_ids.shape[1] - 1 > longest:
        raise ValueError(
            f"sequences may have at most {longest + 1} tokens with this model's positions in context {context!r}, "
            f"got {input_ids.shape[1]}"
        )


def check_options(
    method: Method, context: str, budgets: list[Budget], reference: Tensor | None, reductions: Sequence[Reduction]
) -> None:
    """Raise a ValueError if options of a search exclude each other."""
    if context != "reference" and reference is not None:
        raise ValueError(f"reference goes with context 'reference', got context {context!r}")
    if context == "committed" and any(isinstance(each, OnAverage) for each in budgets):
        raise ValueError("context 'committed' has no budget on average: every token spends its own")
    for each in reductions:
        name = type(each).__name__
        if each.every_route and not method.every_route:
            raise ValueError(f"{name} needs a method that tries every route: use 'exact'")
        if context == "committed" and not each.left_to_right:
            raise ValueError(f"{name} does not go with context 'committed'; use 'shared' or 'reference'")


def _check_untouched(model: DuoForCausalLM) -> None:
    """The search reads the head's matrix, and runs the parts of a layer itself: what is put around them has no say."""
    if not is_plain(model.lm_head) or model.lm_head.bias is not None:
        kinds = f"{type(model.lm_head).__name__} with {type(getattr(model.lm_head, 'weight', None)).__name__}"
        raise ValueError(
            "a search reads the head's matrix: lm_head must be an nn.Linear without bias or hooks, its weights in "
            f"memory and not quantised, got {kinds}; merge adapters, do not offload, leave lm_head out of quantisation"
        )
    walked: dict[str, tuple[nn.Module, str]] = {"model": (model.model, "DuoModel")}
    for index, layer in enumerate(decoder_layers(model.model)):
        name = f"model.layers.{index}"
        walked[name] = (layer, "DuoDecoderLayer")
        walked |= {f"{name}.self_attn": (layer.self_attn, "DuoAttention"), f"{name}.mlp": (layer.mlp, "DuoMLP")}
    for name, (part, kind) in walked.items():
        # By name: a model may run the code that was saved with it. A subclass may have a forward of its own.
        if is_watched(part) or type(part).forward.__qualname__ != f"{kind}.forward":
            raise ValueError(
                f"a search runs the parts of a layer itself, so the hook or the forward that was put on {name} would "
                f"have no effect; remove it, or put it on a norm, a projection or an FFN"
            )


def _draws(part: nn.Module) -> bool:
    """Whether a dropout, torch's or the attention's, is at work."""
    dropout = part.p if isinstance(part, nn.Dropout) else 0.0
    if isinstance(part, DuoAttention):
        dropout = part.config.attention_dropout
    return part.training and dropout > 0


def _longest(config: DuoConfig, context: str) -> int | None:
    """The largest number of predicting tokens that the positions allow; None: any."""
    rope = config.rope_parameters or {}
    if config.positions == "learned":
        return config.max_position_embeddings
    if context == "committed" and rope.get("rope_type") in ("dynamic", "longrope"):
        # Beyond it these rotations depend on how much has been read: executing a pick would change earlier losses.
        return int(rope.get("original_max_position_embeddings", config.max_position_embeddings))
    return None
