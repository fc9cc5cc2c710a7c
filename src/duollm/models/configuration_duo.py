"""Configuration of the duo model: a decoder whose layers hold a big and a small FFN side by side."""

import sys
from difflib import get_close_matches
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

# Keys by which other decoders compute what the duo does not, or by which they call what it has under another name.
# fmt: off
_FOREIGN = {
    "activation", "activation_function", "alibi", "attention_chunk_size", "attention_multiplier", "attn_config",
    "attn_logit_softcapping", "clip_qkv", "d_ff", "d_model", "dim", "dim_model_base", "do_layer_norm_before",
    "embedding_multiplier", "ffn_dim", "ffn_hidden_size", "final_logit_softcapping", "hidden_activation",
    "kv_channels", "layer_norm_epsilon", "layerdrop", "logit_scale", "logits_scaling", "max_window_layers",
    "moe_intermediate_size", "multi_query", "mup_width_multiplier", "n_embd", "n_embed", "n_head", "n_inner",
    "n_kv_heads", "n_layer", "n_layers", "n_positions", "new_decoder_architecture", "no_rope_layers", "norm_eps",
    "norm_epsilon", "num_experts", "num_experts_per_tok", "num_heads", "num_local_experts", "parallel_attn",
    "partial_rotary_factor", "query_pre_attn_scalar", "residual_multiplier", "rotary_base", "rotary_dim",
    "rotary_emb_base", "rotary_emb_fraction", "rotary_pct", "scale_depth", "scale_emb", "scale_embedding",
    "use_bias", "use_parallel_residual", "use_qk_norm", "use_sliding_window", "window_size", "word_embed_proj_dim",
}
# fmt: on

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

_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
_LAYER_TYPES = ("full_attention", "sliding_attention")


@strict
class DuoConfig(PreTrainedConfig):
    """Configuration of a duo. Names and meanings are those of `LlamaConfig`, and the defaults make a Llama.

    These attributes are new, or not those of a Llama:

    Attributes:
        intermediate_size: inner width of the big FFN.
        small_intermediate_size: inner width of the small FFN.
        small_linear: whether the small FFN is a linear map of rank `small_intermediate_size` with a bias.
        skip_scope: what `Branch.SKIP` bypasses: "ffn" (attention still acts) or "layer" (the
            token's attention output is dropped too; its keys and values are still computed).
        norm: "rms" (root mean square) or "layer" (mean and variance, with a bias). Both use `rms_norm_eps`.
        positions: "rotary" or "learned" (a table of `max_position_embeddings` entries, added to the embeddings).
        gated_ffn: whether an FFN is down(act(gate(x)) * up(x)) or, if not, down(act(up(x))).
        qkv_bias: whether queries, keys and values have biases; with `attention_bias` the output has one too.
        qk_norm: whether each head's queries and keys are normalised before rotation.
        hidden_dropout: dropout, in training, on what attention and FFN add to the residual stream.
        sliding_window: number of positions, its own included, that a token attends to in sliding layers.
        layer_types: per layer "full_attention" or "sliding_attention"; default: all sliding if there is a
            window, else all full.
        dense_family: the dense family that the model came from and can be turned into again (docs/checkpoints.md).

    Unknown keys, such as tools write, are kept and saved again. Keys that look like a misspelt field, or that change
    what other decoders compute, are refused. If `num_hidden_layers` is reduced, the first of the `layer_types` count.

    Raises:
        ValueError: an unknown key would change the computation, or sizes do not divide.
        huggingface_hub.errors.StrictDataclassFieldValidationError: a value has the wrong type.
    """

    model_type = "duo"
    keys_to_ignore_at_inference = ["cache", "past_key_values", "choices"]  # noqa: RUF012
    base_model_pp_plan = {  # noqa: RUF012
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

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
    small_linear: bool = False
    skip_scope: Literal["ffn", "layer"] = "ffn"
    norm: Literal["rms", "layer"] = "rms"
    positions: Literal["rotary", "learned"] = "rotary"
    gated_ffn: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False
    hidden_dropout: float = 0.0
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    dense_family: str = "llama"

    def __post_init__(self, **kwargs: Any) -> None:
        self._refuse_foreign(kwargs)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        width_given = self.head_dim is not None
        if self.head_dim is None:
            self.head_dim = self.hidden_size // max(1, self.num_attention_heads)
        if self.layer_types is None:
            kind = "full_attention" if self.sliding_window is None else "sliding_attention"
            self.layer_types = [kind] * self.num_hidden_layers
        self.layer_types = self.layer_types[: self.num_hidden_layers]
        super().__post_init__(**kwargs)
        self.base_model_tp_plan = self._tp_plan()  # type: ignore[misc]  # not of the class: layers differ
        # transformers drops what belongs to generation, and would refuse to save it as an attribute.
        dropped = kwargs.keys() - self.__dict__.keys()
        self._of_generation = {key: kwargs[key] for key in dropped & GenerationConfig().to_dict().keys()}
        self._check_sizes(width_given)
        self._check_positions()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Let fields given to `from_pretrained` be checked together with the saved ones."""
        given = {key: kwargs.pop(key) for key in cls.__annotations__ if key in kwargs}
        return super().from_dict(config_dict | given, **kwargs)

    def _refuse_foreign(self, kwargs: dict[str, Any]) -> None:
        """transformers sets unknown keys silently; a misspelt size must not pass, nor another model's switch."""
        fields, model_type = DuoConfig.__annotations__, kwargs.get("model_type", self.model_type)
        if model_type != self.model_type:
            raise ValueError(f"this is a {model_type} model, not a duo; make one with DuoForCausalLM.from_dense")
        for key, value in kwargs.items():
            if value is None or key.startswith("_") or hasattr(PreTrainedConfig, key):
                continue
            if key.endswith(("_token", "_token_id")) or key.startswith("batch_norm"):
                continue  # tokens and norms that the duo does not have, though their names are like its own
            if value is False and key in _FOREIGN - {"do_layer_norm_before"} and self.sliding_window is None:
                continue  # switched off, as it is here
            near = get_close_matches(key, fields, n=1, cutoff=0.7)
            if near or key in _FOREIGN:
                hint = f"; did you mean {near[0]!r}?" if near else f"; allowed: {', '.join(sorted(fields))}"
                raise ValueError(f"DuoConfig has no key {key!r}{hint}")

    def to_dict(self) -> dict[str, Any]:
        """Return all keys, those kept for other tools too."""
        _register_with_peft(self.model_type)
        found = super().to_dict()
        return found | found.pop("_of_generation", {})

    def _tp_plan(self) -> dict[str, str]:
        """How tensor parallelism splits the layers; it may name only what they have."""
        ffn = [f"mlp.{size}" for size in ("small", "big")]
        split = {f"self_attn.{part}_proj": "colwise" for part in "qkv"}
        split |= {f"{each}.{part}_proj": "colwise" for each in ffn for part in ("gate", "up")[not self.gated_ffn :]}
        if self.small_linear:
            split.pop("mlp.small.gate_proj", None)
        split |= dict.fromkeys(("self_attn.o_proj", *(f"{each}.down_proj" for each in ffn)), "rowwise")
        if self.qk_norm:
            split |= {f"self_attn.{part}_norm": "replicated_with_grad_allreduce" for part in "qk"}
        return {f"layers.*.{part}": how for part, how in split.items()}

    @property
    def attention_shape(self) -> tuple[int, int, int]:
        """Query heads, key/value heads, and the width of each."""
        assert self.num_key_value_heads is not None
        assert self.head_dim is not None
        return self.num_attention_heads, self.num_key_value_heads, self.head_dim

    @property
    def windows(self) -> list[int | None]:
        """Per layer how many positions a token attends to, its own included; None: all."""
        assert self.layer_types is not None
        return [self.sliding_window if kind == "sliding_attention" else None for kind in self.layer_types]

    def _check_sizes(self, width_given: bool) -> None:
        """Not transformers' `validate_architecture`, which wraps the error in one that is no ValueError."""
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        heads, key_value_heads, head_dim = self.attention_shape
        if self.hidden_size % heads and not width_given:
            raise ValueError(f"num_attention_heads ({heads}) must divide hidden_size ({self.hidden_size})")
        if heads % key_value_heads:
            raise ValueError(f"num_key_value_heads ({key_value_heads}) must divide num_attention_heads ({heads})")
        if head_dim % 2 and self.positions == "rotary":
            raise ValueError(f"head_dim ({head_dim}) must be even for rotary positions")

    def _check_positions(self) -> None:
        rope = self.rope_parameters or {}
        if rope.get("rope_type", "default") not in _ROPE_TYPES:
            raise ValueError(
                f"rope_type {rope['rope_type']!r} is not supported; supported are {', '.join(_ROPE_TYPES)}"
            )
        if rope.get("partial_rotary_factor", 1) != 1:
            raise ValueError(f"partial_rotary_factor must be 1, got {rope['partial_rotary_factor']}")
        kinds = self.layer_types or []
        if len(kinds) != self.num_hidden_layers or not set(kinds) <= set(_LAYER_TYPES):
            raise ValueError(
                f"layer_types must be {self.num_hidden_layers} times one of {', '.join(_LAYER_TYPES)}, got {kinds}"
            )
        if "sliding_attention" in kinds and (self.sliding_window or 0) < 1:
            raise ValueError(f"sliding_attention needs sliding_window to be at least 1, got {self.sliding_window}")


def _register_with_peft(model_type: str) -> None:
    """Let PEFT choose the modules of a duo as it does for a Llama; it asks for the configuration's dictionary first."""
    constants = sys.modules.get("peft.utils.constants")
    for name, modules_of in vars(constants).items() if constants else ():
        if name.endswith("_MODULES_MAPPING") and "llama" in modules_of:
            modules_of.setdefault(model_type, modules_of["llama"])


DuoConfig.register_for_auto_class()  # a saved configuration carries this file
if __package__ == "duollm.models":  # and who loads such a copy registers it
    AutoConfig.register(DuoConfig.model_type, DuoConfig, exist_ok=True)
