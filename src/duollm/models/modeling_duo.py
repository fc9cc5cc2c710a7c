"""The duo language model, whole: a decoder in which each token takes a branch at each layer.

Read it from the bottom up or the top down: `DuoForCausalLM` (head and loss) holds `DuoModel`
(embedding, layers, final norm), which holds `DuoDecoderLayer` (attention, then the branch a policy
chose: skip, small or big FFN).

Shape letters: B batch, T tokens, N = B * T, L layers, C branches (skip, small, big), D hidden,
H heads, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb, repeat_kv
from transformers.utils.output_capturing import capture_outputs

from .branch import Branch
from .configuration_duo import DuoConfig
from .dispatch import Dispatch
from .fused import FFN
from .norm import DuoRMSNorm, make_norm
from .policy import Choice, FixedRoutes, Policy, check_routes

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines [1 or B, T, d] of the positions."""

POSITION_OFFSET = 2
"""OPT's table of learned positions begins with so many rows that no position uses."""

_MASKS: dict[str, Callable[..., Any]] = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
}


@dataclass
class DuoModelOutput(BaseModelOutputWithPast):
    """`choices`: per layer what the policy chose."""

    choices: tuple[Any, ...] | None = None


@dataclass
class DuoCausalLMOutput(CausalLMOutputWithPast):
    """`choices`: per layer what the policy chose; `routes`: the same as integers [B, T, L] (hard only)."""

    choices: tuple[Any, ...] | None = None

    @property
    def routes(self) -> Tensor:
        """The routes taken, integers [B, T, L], values of `Branch`; soft choices count as their largest weight."""
        assert self.logits is not None
        assert self.choices is not None
        batch, device = len(self.logits), self.logits.device
        return torch.stack([_as_integers(choice, device).view(batch, -1) for choice in self.choices], dim=-1)


def eager_attention(
    module: "DuoAttention",
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention as three plain operations, [B, H, T, d] -> [B, T, H, d].

    On CPUs its backward is faster than the fused kernel's for short sequences.
    """
    key = repeat_kv(key, module.num_key_value_groups)
    value = repeat_kv(value, module.num_key_value_groups)
    scores = torch.matmul(query * scaling, key.transpose(2, 3))
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2), weights


class DuoAttention(nn.Module):
    """Grouped-query attention, as in Llama."""

    def __init__(self, config: DuoConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        heads, key_value_heads, self.head_dim = config.attention_shape
        self.num_key_value_groups = heads // key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.sliding_window = config.windows[layer_idx]
        width, bias = config.hidden_size, config.attention_bias or config.qkv_bias
        self.q_proj = nn.Linear(width, heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * self.head_dim, width, bias=config.attention_bias)
        self.q_norm = DuoRMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = DuoRMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def project(self, states_BTD: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [B, H, T, d], keys and values [B, H_kv, T, d], normalised and rotated as configured."""
        shape = (*states_BTD.shape[:-1], -1, self.head_dim)
        query, key, value = (
            projection(states_BTD).view(shape).transpose(1, 2) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if rotary is not None:
            cos, sin = (table.to(query.dtype) for table in rotary)
            query, key = apply_rotary_pos_emb(query, key, cos, sin)
        return query, key, value

    def forward(
        self,
        states_BTD: Tensor,
        rotary: Rotary | None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attention output [B, T, D] and, where the implementation has them, its weights."""
        query, key, value = self.project(states_BTD, rotary)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        dropout = self.config.attention_dropout if self.training else 0.0
        settings = {"dropout": dropout, "scaling": self.scaling, "sliding_window": self.sliding_window}
        mixed, weights = attend(self, query, key, value, attention_mask, **settings, **kwargs)
        return self.o_proj(mixed.reshape(*states_BTD.shape[:-1], -1)), weights


class DuoFFN(FFN):
    """One feed-forward network, sized by the configuration."""

    def __init__(self, config: DuoConfig, intermediate_size: int) -> None:
        super().__init__()
        width, bias = config.hidden_size, config.mlp_bias
        self.gate_proj = nn.Linear(width, intermediate_size, bias=bias) if config.gated_ffn else None
        self.up_proj = nn.Linear(width, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, width, bias=bias)
        self.act_fn = ACT2FN[config.hidden_act]


class DuoMLP(nn.Module):
    """The branches of one layer: nothing, the small FFN or the big FFN."""

    def __init__(self, config: DuoConfig) -> None:
        super().__init__()
        self.small = DuoFFN(config, config.small_intermediate_size)
        self.big = DuoFFN(config, config.intermediate_size)

    def branch(self, branch: Branch, states: Tensor, some: bool = False) -> Tensor:
        """Send states [..., D] through one branch: those of all tokens, or of some of them."""
        if branch == Branch.SKIP:
            return torch.zeros_like(states)
        ffn = self.small if branch == Branch.SMALL else self.big
        return ffn.of_some(states) if some else ffn(states)

    def forward(self, states_BTD: Tensor, choice: Choice) -> Tensor:
        """Send each token through its branch; soft choices mix the branches by their weights."""
        if isinstance(choice, Tensor) and choice.is_floating_point():
            return self.mix(states_BTD, choice)
        return self.sparse(states_BTD, choice if isinstance(choice, Dispatch) else Dispatch.from_choice(choice))

    def mix(self, states_BTD: Tensor, weights_BTC: Tensor) -> Tensor:
        """Compute every branch and add them up, weighted. One-hot weights select: the reference path."""
        weights_BTC = weights_BTC.to(states_BTD.dtype)
        small, big = (weights_BTC[..., branch, None] for branch in (Branch.SMALL, Branch.BIG))
        return self.small(states_BTD) * small + self.big(states_BTD) * big

    def sparse(self, states_BTD: Tensor, dispatch: Dispatch) -> Tensor:
        """Compute for each token only its branch: gather, one dense product per branch, scatter."""
        if dispatch.branch is not None:
            return self.branch(dispatch.branch, states_BTD)
        groups = dispatch.group(states_BTD.flatten(0, 1))
        outputs = [self.branch(each, rows, some=True) for each, rows in zip(Branch, groups, strict=True) if len(rows)]
        return dispatch.ungroup(outputs).view_as(states_BTD)


class DuoDecoderLayer(GradientCheckpointingLayer):
    """Attention, then the chosen branch, each with a residual connection."""

    def __init__(self, config: DuoConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.skip_scope = config.skip_scope
        self.self_attn = DuoAttention(config, layer_idx)
        self.mlp = DuoMLP(config)
        self.input_layernorm = make_norm(config)
        self.post_attention_layernorm = make_norm(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self, hidden_BTD: Tensor, policy: Policy, memory: Any, execution: str, **attention: Any
    ) -> tuple[Tensor, Choice, Any]:
        """Return the layer's output [B, T, D], what the policy chose and its memory."""
        states_BTD = self.input_layernorm(hidden_BTD)
        if self.skip_scope == "layer":
            choice, memory = policy(self.layer_idx, states_BTD, memory)
        attended_BTD, _ = self.self_attn(states_BTD, **attention)
        if self.skip_scope == "layer":
            attended_BTD = attended_BTD * _kept(choice, attended_BTD)
        hidden_BTD = hidden_BTD + (self.dropout(attended_BTD) if self.training else attended_BTD)
        states_BTD = self.post_attention_layernorm(hidden_BTD)
        if self.skip_scope == "ffn":
            choice, memory = policy(self.layer_idx, states_BTD, memory)
        executed = _one_hot(choice, states_BTD) if execution == "reference" else choice
        output_BTD = self.mlp(states_BTD, executed)
        return hidden_BTD + (self.dropout(output_BTD) if self.training else output_BTD), choice, memory


class DuoPreTrainedModel(PreTrainedModel):
    """What transformers has to know about the family."""

    config_class = DuoConfig
    config: DuoConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DuoDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": DuoDecoderLayer, "attentions": DuoAttention}  # noqa: RUF012


class DuoModel(DuoPreTrainedModel):
    """Embedding, layers and final norm."""

    def __init__(self, config: DuoConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DuoDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = make_norm(config)
        if config.positions == "rotary":
            self.rotary_emb = LlamaRotaryEmbedding(config=cast(Any, config))  # the fields it reads are the same
        else:
            self.embed_positions = nn.Embedding(config.max_position_embeddings + POSITION_OFFSET, config.hidden_size)
        self.post_init()

    def place(self, embedded_BTD: Tensor, position_ids: Tensor) -> tuple[Tensor, Rotary | None]:
        """Give embeddings their positions: learned ones are added, rotary ones are tables for the attention."""
        if self.config.positions == "rotary":
            return embedded_BTD, self.rotary_emb(embedded_BTD, position_ids=position_ids)
        limit = self.config.max_position_embeddings
        if position_ids.max() >= limit:
            raise ValueError(f"the model knows positions 0 .. {limit - 1}, got {position_ids.max()}; shorten the text")
        return embedded_BTD + self.embed_positions(position_ids + POSITION_OFFSET), None

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        policy: Policy | None = None,
        execution: str = "sparse",
        **kwargs: Any,
    ) -> DuoModelOutput:
        """Return the final normalised hidden states [B, T, D], the cache and the choices."""
        given = _only_one(input_ids, inputs_embeds)
        hidden_BTD = self.embed_tokens(given) if inputs_embeds is None else given
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = _positions(attention_mask, seen, hidden_BTD)
        hidden_BTD, rotary = self.place(hidden_BTD, position_ids)
        masks = self._masks(hidden_BTD, attention_mask, past_key_values, position_ids)
        policy = policy or FixedRoutes(torch.full((len(self.layers),), Branch.BIG.value))
        choices: list[Choice] = []
        memory = policy.begin(position_ids.expand(hidden_BTD.shape[:2])) if hasattr(policy, "begin") else None
        for layer, mask in zip(self.layers, masks, strict=True):
            hidden_BTD, choice, memory = layer(
                hidden_BTD,
                policy=policy,
                memory=memory,
                execution=execution,
                rotary=rotary,
                attention_mask=mask,
                past_key_values=past_key_values,
                **kwargs,
            )
            choices.append(choice)
        return DuoModelOutput(
            last_hidden_state=self.norm(hidden_BTD), past_key_values=past_key_values, choices=tuple(choices)
        )

    def _masks(
        self, hidden_BTD: Tensor, attention_mask: Tensor | None, past: Cache | None, position_ids: Tensor
    ) -> list[Any]:
        """What each layer may attend to, in the form that its attention wants."""
        kinds = cast(list[str], self.config.layer_types)
        given = {"attention_mask": attention_mask, "past_key_values": past, "position_ids": position_ids}
        masks = {kind: _MASKS[kind](self.config, inputs_embeds=hidden_BTD, **given) for kind in set(kinds)}
        return [masks[kind] for kind in kinds]


class DuoForCausalLM(DuoPreTrainedModel, GenerationMixin):
    """The duo language model with its head; the model class of every study.

    Attributes:
        policy: the policy in force when a forward gets neither `routes` nor `policy`, for example a
            trained router; None means all big. Not saved with the weights.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: DuoConfig) -> None:
        super().__init__(config)
        self.model = DuoModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._attached: tuple[Policy | None] = (None,)  # in a tuple: a router must not become a submodule
        self.post_init()

    @classmethod
    def from_dense(cls, dense: Any, small_intermediate_size: int, **options: Any) -> "DuoForCausalLM":
        """Make a duo of a dense model: its FFNs become the big ones, the small ones start at random.

        Args:
            dense: a transformers model (it is copied), a local folder with safetensors, or a hub id.
            small_intermediate_size: inner width of the small FFNs.
            options: `skip_scope`; `dtype`, default that of the checkpoint; the rest (`revision`, `token`,
                `attn_implementation`, `device_map`, ...) goes to `from_pretrained`.

        Raises:
            ValueError: the architecture, one of its options or a weight is not supported; names it.
        """
        from .conversion import from_dense

        return from_dense(cls, dense, small_intermediate_size, **options)

    def to_dense(self, routes: Any = "big") -> PreTrainedModel:
        """Copy what the model is under a fixed route into a plain transformers model of its dense family.

        Args:
            routes: "big", "small", or a branch for each layer; all layers must take the same.

        Raises:
            ValueError: there is no such dense model; says why.
        """
        from .conversion import to_dense

        return to_dense(self, routes)

    @property
    def policy(self) -> Policy | None:
        """The attached policy."""
        return self._attached[0]

    def attach(self, policy: Policy | None) -> "DuoForCausalLM":
        """Make `policy` the one in force (None: all big) and return the model."""
        self._attached = (policy,)
        return self

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

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        routes: Tensor | None = None,
        policy: Policy | None = None,
        execution: str = "sparse",
        **kwargs: Any,
    ) -> DuoCausalLMOutput:
        """Run the model under given routes, a given policy, the attached policy, or all big.

        Args:
            input_ids: token ids [B, T].
            attention_mask: 1 for tokens, 0 for padding, [B, T past and present].
            labels: token ids [B, T], -100 to leave a position out; shifted inside, so the loss is
                the mean nll (nats) of token t + 1 given tokens up to t.
            logits_to_keep: compute only the last so many logits (0: all), or those at given indices.
            routes: integers [L] (all tokens alike) or [B, T, L], values of `Branch`.
            policy: says which branch each token takes at each layer.
            execution: "sparse" computes only the chosen branches, "reference" computes all and selects.

        Raises:
            ValueError: illegal routes, both routes and policy, or an unknown execution.
        """
        if execution not in ("sparse", "reference"):
            raise ValueError(f"execution must be 'sparse' or 'reference', got {execution!r}")
        if routes is not None:
            if policy is not None:
                raise ValueError("give routes or a policy, not both")
            batch, tokens = _only_one(input_ids, inputs_embeds).shape[:2]
            policy = FixedRoutes(check_routes(routes, batch, tokens, self.config.num_hidden_layers))
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=self.config.use_cache if use_cache is None and not self.training else use_cache,
            policy=policy or self.policy,
            execution=execution,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return DuoCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            choices=outputs.choices,
        )


def _only_one(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """Whichever of the two was given."""
    given = [each for each in (input_ids, inputs_embeds) if each is not None]
    if len(given) != 1:
        raise ValueError(f"give exactly one of input_ids and inputs_embeds, got {len(given)}")
    return given[0]


def _positions(attention_mask: Tensor | None, seen: int, hidden_BTD: Tensor) -> Tensor:
    """Position of every token in its row's text, [1 or B, T]: padding before it does not count."""
    tokens = hidden_BTD.shape[1]
    if attention_mask is not None and attention_mask.ndim == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens:]
    return torch.arange(seen, seen + tokens, device=hidden_BTD.device)[None]


def _as_integers(choice: Choice, device: torch.device) -> Tensor:
    """The branch of every token, [N] or [B, T]."""
    if isinstance(choice, Dispatch):
        return choice.choice_N(device)
    return choice.argmax(-1) if choice.is_floating_point() else choice


def _one_hot(choice: Choice, states_BTD: Tensor) -> Tensor:
    """The choice as weights [B, T, C]."""
    if isinstance(choice, Tensor) and choice.is_floating_point():
        return choice
    integers_BT = _as_integers(choice, states_BTD.device).view(states_BTD.shape[:2])
    return nn.functional.one_hot(integers_BT, len(Branch)).to(states_BTD.dtype)


def _kept(choice: Choice, states_BTD: Tensor) -> Tensor:
    """How much of the attention output each token keeps when skip bypasses the layer, [B, T, 1]."""
    return 1 - _one_hot(choice, states_BTD)[..., Branch.SKIP, None]


DuoForCausalLM.register_for_auto_class("AutoModelForCausalLM")  # a saved model carries this file and what it imports
if __package__ == "duollm.models":  # and who loads such a copy registers it
    AutoModelForCausalLM.register(DuoConfig, DuoForCausalLM, exist_ok=True)
