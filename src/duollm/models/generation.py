"""What the duo adds to transformers' `generate`: routes and policies have no rows, and an assistant takes its own."""

from functools import cache, wraps
from typing import Any, cast

import torch
import transformers
from transformers import GenerationConfig, GenerationMixin

from .compat import CACHE, with_current_cache_name
from .configuration_duo import DuoConfig

NEWEST_TESTED = "5.24.0"
_TOLERANCE = 1e-3
_ROUTING = ("routes", "policy", "execution")


class DuoGenerationMixin(GenerationMixin):
    """`generate` with `routes` of shape [L] or a policy."""

    @wraps(GenerationMixin.generate)
    def generate(self, *inputs: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """As everywhere, the cache may be given under either of its names."""
        return cast(Any, super()).generate(*inputs, **with_current_cache_name(kwargs))

    @wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, *inputs: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """So for those who write the loop themselves."""
        return cast(Any, super()).prepare_inputs_for_generation(*inputs, **with_current_cache_name(kwargs))

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **model_kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Give each beam its row of everything; routes [L] for all tokens have no rows."""
        routes = model_kwargs.pop("routes", None)
        if routes is not None and torch.as_tensor(routes).ndim > 1:
            raise ValueError(
                "generate takes routes of shape [L], one for all tokens: [B, T, L] says nothing about tokens to come; "
                "give a policy to let tokens differ"
            )
        expand = cast(Any, super())._expand_inputs_for_generation
        input_ids, expanded = expand(expand_size, is_encoder_decoder, input_ids, **model_kwargs)
        return input_ids, expanded | {"routes": routes}

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Trust a cache only under a version of transformers that decodes rightly with one."""
        kind: Any = type(self)
        if generation_config.use_cache and not getattr(self, "is_toy", False):
            check_cached_decoding(kind)
        given = model_kwargs.get(CACHE)
        cast(Any, super())._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if given is None and CACHE in model_kwargs:
            # At an early exit fewer layers run than `layer_types` names; 5.15 to 5.18 cannot crop those left empty.
            del model_kwargs[CACHE].layers[cast(Any, self).config.num_hidden_layers :]

    def _get_candidate_generator(self, *, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:  # type: ignore[override]
        """Let the assistant draft with the policy attached to it: this model's may not fit, or be unknown there."""
        own = {name: value for name, value in model_kwargs.items() if name not in _ROUTING}
        return cast(Any, super())._get_candidate_generator(model_kwargs=own, **kwargs)

    def _valid_auto_compile_criteria(self, model_kwargs: dict[str, Any], generation_config: GenerationConfig) -> bool:
        """Under a policy shapes depend on what it chooses, so that every step would compile anew."""
        attached = cast(Any, self).policy
        routed = attached is not None or any(model_kwargs.get(name) is not None for name in ("routes", "policy"))
        return not routed and cast(Any, super())._valid_auto_compile_criteria(model_kwargs, generation_config)


@cache
def check_cached_decoding(kind: Any) -> None:
    """Raise a RuntimeError of one line if a toy of class `kind` decodes differently with a cache; once per process.

    `generate` and a model agree on names and meanings of what passes between them, and a release of transformers may
    change either. Then a model can start an empty cache at every step and write nonsense without an error.
    """
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
