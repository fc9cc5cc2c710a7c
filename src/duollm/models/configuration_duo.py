"""Configuration of the duo model: a Llama whose layers hold a big and a small FFN side by side."""

from difflib import get_close_matches
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

# Keys that transformers itself passes through a config, in addition to the declared fields.
_TRANSFORMERS_KEYS = {
    "attn_implementation",
    "auto_map",
    "model_type",
    "name_or_path",
    "output_attentions",
    "rope_scaling",
    "rope_theta",
    "torch_dtype",
}

_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "small_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


@strict
class DuoConfig(PreTrainedConfig):
    """Names and meanings are those of `LlamaConfig`; two are new.

    Attributes:
        intermediate_size: inner width of the big FFN.
        small_intermediate_size: inner width of the small FFN.
        skip_scope: what `Branch.SKIP` bypasses: "ffn" (attention still acts) or "layer" (the
            token's attention output is dropped too; its keys and values are still computed).

    Raises:
        ValueError: a key is unknown, or sizes do not divide.
        huggingface_hub.errors.StrictDataclassFieldValidationError: a value has the wrong type.
    """

    model_type = "duo"
    keys_to_ignore_at_inference = ("past_key_values", "choices")

    vocab_size: int = 4096
    hidden_size: int = 128
    intermediate_size: int = 512
    small_intermediate_size: int = 32
    num_hidden_layers: int = 12
    num_attention_heads: int = 2
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False
    skip_scope: Literal["ffn", "layer"] = "ffn"

    def __post_init__(self, **kwargs: Any) -> None:
        self._refuse_unknown(kwargs)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // max(1, self.num_attention_heads)
        super().__post_init__(**kwargs)
        self._check_sizes()

    def _refuse_unknown(self, kwargs: dict[str, Any]) -> None:
        """transformers sets unknown keys silently; a misspelt size must not pass."""
        fields = DuoConfig.__annotations__
        for key in kwargs:
            if key.startswith("_") or key in _TRANSFORMERS_KEYS or hasattr(PreTrainedConfig, key):
                continue
            near = get_close_matches(key, fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; allowed: {', '.join(sorted(fields))}"
            raise ValueError(f"DuoConfig has no key {key!r}{hint}")

    @property
    def attention_shape(self) -> tuple[int, int, int]:
        """Query heads, key/value heads, and the width of each."""
        assert self.num_key_value_heads is not None
        assert self.head_dim is not None
        return self.num_attention_heads, self.num_key_value_heads, self.head_dim

    def _check_sizes(self) -> None:
        """Not transformers' `validate_architecture`, which wraps the error in one that is no ValueError."""
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        heads, key_value_heads, head_dim = self.attention_shape
        if self.hidden_size % heads:
            raise ValueError(f"num_attention_heads ({heads}) must divide hidden_size ({self.hidden_size})")
        if heads % key_value_heads:
            raise ValueError(f"num_key_value_heads ({key_value_heads}) must divide num_attention_heads ({heads})")
        if head_dim % 2:
            raise ValueError(f"head_dim ({head_dim}) must be even for rotary positions")


DuoConfig.register_for_auto_class()  # a saved configuration carries this file
if __package__ == "duollm.models":  # and who loads such a copy registers it
    AutoConfig.register(DuoConfig.model_type, DuoConfig, exist_ok=True)
