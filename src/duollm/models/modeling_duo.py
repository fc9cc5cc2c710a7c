"""The duo language model: a decoder in which each token takes a branch at each layer.

`DuoForCausalLM` (head and loss) holds `DuoModel` (embedding, layers, final norm), which holds `DuoDecoderLayer`
(attention, then the branch that a policy chose: skip, small or big FFN).

Shape letters: B batch, T tokens, N = B * T, L layers, C branches (skip, small, big), D hidden,
H heads, V vocabulary.
"""

from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention import DuoAttention, Rotary, attention_function, make_norm
from .branch import BRANCHES, Branch
from .compat import (
    CACHE,
    DuoCausalLMOutput,
    DuoModelOutput,
    checkpoint_nested,
    hidden_to_keep,
    make_mask,
    only_cache,
    pop_loss_keywords,
    refuse_unknown,
    without_values,
)
from .configuration_duo import DuoConfig
from .dispatch import Dispatch
from .ffn import DuoFFN
from .generation import DuoGenerationMixin
from .policy import AllBig, Choice, FixedRoutes, Policy, check_routes, choice_tensors, choice_weights

if TYPE_CHECKING:  # conversion imports it; older transformers fetch only the files that this one names
    from .families import Family  # noqa: F401

POSITION_OFFSET = 2
"""OPT's table of learned positions begins with so many rows that no position uses."""


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
        self, hidden_BTD: Tensor, memory: Any, policy: Policy, execution: str, **attention: Any
    ) -> tuple[Tensor, Choice, Any]:
        """Return the layer's output [B, T, D], what the policy chose and its memory."""
        if self.skip_scope == "layer":
            states_BTD = self.input_layernorm(hidden_BTD)
            choice, memory = policy(self.layer_idx, states_BTD, memory)
            hidden_BTD, states_BTD = self.attend(hidden_BTD, choice, states_BTD, **attention)
        else:
            hidden_BTD, states_BTD = self.attend(hidden_BTD, Branch.BIG, **attention)
            choice, memory = policy(self.layer_idx, states_BTD, memory)
        executed = choice_weights(choice, states_BTD) if execution == "reference" else choice
        return self.branch(executed, hidden_BTD, states_BTD), choice, memory

    def attend(self, hidden: Tensor, choice: Choice, states: Any = None, **attention: Any) -> tuple[Tensor, Tensor]:
        """Do the first half, the attention. Tokens that skip the layer get nothing from it."""
        output, _ = self.self_attn(self.input_layernorm(hidden) if states is None else states, **attention)
        if not isinstance(choice, Branch) or choice == Branch.SKIP:
            output = output * (1 - choice_weights(choice, output)[..., Branch.SKIP, None])
        return self.attended(hidden, output)

    def attended(self, hidden: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """End the first half: add the attention's output; return the hidden states and the same normalised."""
        hidden = hidden + (self.dropout(output) if self.training else output)
        return hidden, self.post_attention_layernorm(hidden)

    def branch(self, choice: Choice, hidden: Tensor, states: Tensor, fused: bool = False) -> Tensor:
        """Do the second half: add what the chosen branches make of the normalised states.

        Args:
            hidden, states: what `attended` returned.
            fused: where all tokens take one branch, add its output within its last product; inference only.
        """
        if fused and isinstance(choice, Branch):
            return hidden if choice == Branch.SKIP else self.mlp.ffn(choice).added_to(hidden, states)
        output = self.mlp(states, choice)
        return hidden + (self.dropout(output) if self.training else output)


class DuoMLP(nn.Module):
    """The branches of one layer: nothing, the small FFN or the big FFN."""

    def __init__(self, config: DuoConfig) -> None:
        super().__init__()
        self.small = DuoFFN(config, config.small_intermediate_size, config.small_linear)
        self.big = DuoFFN(config, config.intermediate_size)

    def ffn(self, branch: Branch) -> DuoFFN:
        """The FFN of a branch that has one."""
        return self.small if branch == Branch.SMALL else self.big

    def branch(self, branch: Branch, states: Tensor, some: bool = False) -> Tensor:
        """Send states [..., D] through one branch: those of all tokens, or of some of them."""
        if branch == Branch.SKIP:
            return torch.zeros_like(states)
        return self.ffn(branch).of_some(states) if some else self.ffn(branch)(states)

    def forward(self, states_BTD: Tensor, choice: Choice) -> Tensor:
        """Send each token through its branch; soft choices mix the branches by their weights."""
        if isinstance(choice, Branch):
            return self.branch(choice, states_BTD)
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
        taken = zip(BRANCHES, groups, strict=True)
        outputs = [self.branch(each, rows, some=True) for each, rows in taken if len(rows)]
        return dispatch.ungroup(outputs).view_as(states_BTD)


class DuoPreTrainedModel(PreTrainedModel):
    """What transformers has to know about the family."""

    config_class = DuoConfig
    config: DuoConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DuoDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": DuoDecoderLayer, "attentions": DuoAttention}  # noqa: RUF012

    def _set_gradient_checkpointing(  # type: ignore[override]  # versions differ in the options
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, **options: Any
    ) -> None:
        """A policy's memory may be nested, and gradients flow through it."""
        nested = partial(checkpoint_nested, gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, nested, **options)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save the model with its code, under which both classes load where duollm is not installed."""
        if self._auto_class is not None:
            self.config.auto_map = {name: f"modeling_duo.{cls}" for name, cls in _AUTO_CLASSES.items()}
        super().save_pretrained(*args, **kwargs)


class DuoModel(DuoPreTrainedModel):
    """Embedding, layers and final norm."""

    def __init__(self, config: DuoConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DuoDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.gradient_checkpointing = False
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
        if not without_values(position_ids) and position_ids.max() >= limit:
            raise ValueError(f"the model knows positions 0 .. {limit - 1}, got {position_ids.max()}; shorten the text")
        return embedded_BTD + self.embed_positions(position_ids + POSITION_OFFSET), None

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        policy: Policy | None = None,
        execution: str = "sparse",
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> DuoModelOutput:
        """Return the final normalised hidden states [B, T, D], the cache and the choices.

        The arguments are those of `DuoForCausalLM`. The first `config.num_hidden_layers` layers run.
        """
        refuse_unknown(self, kwargs, lambda: attention_function(self.config))
        given = _only_one(input_ids, inputs_embeds)
        hidden_BTD = self.embed_tokens(given) if inputs_embeds is None else given
        cache = given_cache = only_cache(cache, past_key_values, kwargs)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        # Texts packed into a row are found by their positions, unless there is a cache; a new one holds nothing yet.
        mask = self._masks(hidden_BTD, attention_mask, given_cache, position_ids)
        if position_ids is None:
            position_ids = _positions(attention_mask, 0 if cache is None else cache.get_seq_length(), hidden_BTD)
        hidden_BTD, rotary = self.place(hidden_BTD, position_ids)
        policy = AllBig() if policy is None else policy
        memory = policy.begin(position_ids.expand(hidden_BTD.shape[:2])) if hasattr(policy, "begin") else None
        choices: list[Choice] = []
        layers, kinds = self.layers[: self.config.num_hidden_layers], cast(list[str], self.config.layer_types)
        for layer, kind in zip(layers, kinds, strict=False):
            hidden_BTD, choice, memory = layer(
                hidden_BTD,
                memory,
                policy=policy,
                execution=execution,
                position_embeddings=rotary,
                attention_mask=mask[kind],
                position_ids=position_ids,
                **{CACHE: cache},
                **kwargs,
            )
            choices.append(choice)
        taken = choice_tensors(choices, hidden_BTD.shape[:2], hidden_BTD.device)
        named: dict[str, Any] = {CACHE: cache}
        return DuoModelOutput(last_hidden_state=self.norm(hidden_BTD), choices=taken, **named)

    def _masks(
        self, hidden_BTD: Tensor, given: Any, cache: Cache | None, position_ids: Tensor | None
    ) -> dict[str, Any]:
        """What the layers of each kind may attend to, in the form that their attention wants."""
        if isinstance(given, dict):  # `generate` has made them
            return given
        settings = {"attention_mask": given, "position_ids": position_ids}
        kinds = set(cast(list[str], self.config.layer_types))
        return {kind: make_mask(kind, self.config, hidden_BTD, cache, **settings) for kind in kinds}


class DuoForCausalLM(DuoPreTrainedModel, DuoGenerationMixin):
    """The duo language model with its head; the model class of every study.

    Attributes:
        policy: the policy in force when a forward gets neither `routes` nor `policy`, for example a
            trained router; None means all big. Not saved with the weights.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # type: ignore[dict-item]  # noqa: RUF012
    _fsdp_plan = {"lm_head": "keep_full_weight"}  # noqa: RUF012

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

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """An attached policy goes to the model's device: pipelines and the Trainer move a model unasked."""
        super()._apply(fn, recurse)
        if isinstance(self.policy, nn.Module):
            self.policy.to(self.device)
        return self

    @can_return_tuple
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
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> DuoCausalLMOutput:
        """Run the model under given routes, a given policy, the attached policy, or all big.

        Args:
            input_ids: token ids [B, T].
            attention_mask: 1 for tokens, 0 for padding, [B, T past and present]; or masks made for the attention.
            past_key_values, cache: keys and values of the tokens before; two names of one argument.
            labels: token ids [B, T], -100 to leave a position out; the loss is the mean nll (nats) of the next token.
            logits_to_keep: only the last so many logits (0: all), a slice, positions [K] or [B, K], or a mask [B, T].
            routes: integers [L] (all tokens alike) or [B, T, L], values of `Branch`.
            policy: says which branch each token takes at each layer.
            execution: "sparse" computes only the chosen branches, "reference" computes all and selects.
            kwargs: what else transformers hands to a model; for the attention function or the loss.

        Raises:
            ValueError: illegal routes, both routes and policy, or an unknown execution.
            TypeError: a keyword that nobody knows.
        """
        if execution not in ("sparse", "reference"):
            raise ValueError(f"execution must be 'sparse' or 'reference', got {execution!r}")
        if routes is not None:
            if policy is not None:
                raise ValueError("give routes or a policy, not both")
            batch, tokens = _only_one(input_ids, inputs_embeds).shape[:2]
            policy = FixedRoutes(check_routes(routes, batch, tokens, self.config.num_hidden_layers))
        for_loss = pop_loss_keywords(kwargs, self.loss_function)
        refuse_unknown(self, kwargs, lambda: attention_function(self.config))
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=False if use_cache is None and self.training else use_cache,
            policy=self.policy if policy is None else policy,
            execution=execution,
            return_dict=True,
            **{CACHE: only_cache(cache, past_key_values, kwargs)},
            **kwargs,
        )
        logits = self.lm_head(hidden_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **for_loss)
        named = {name: getattr(outputs, name) for name in (CACHE, "hidden_states", "attentions", "choices")}
        return DuoCausalLMOutput(loss=loss, logits=logits, **named)


def _only_one(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """Whichever of the two was given."""
    given = [each for each in (input_ids, inputs_embeds) if each is not None]
    if len(given) != 1:
        raise ValueError(f"give exactly one of input_ids and inputs_embeds, got {len(given)}")
    return given[0]


def _positions(attention_mask: Any, seen: Any, hidden_BTD: Tensor) -> Tensor:
    """Position of every token in its row's text, [1 or B, T]: padding before it does not count."""
    tokens = hidden_BTD.shape[1]
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens:]
    return torch.arange(tokens, device=hidden_BTD.device)[None] + seen


_AUTO_CLASSES = {"AutoModel": "DuoModel", "AutoModelForCausalLM": "DuoForCausalLM"}
DuoModel.register_for_auto_class("AutoModel")  # a saved model carries this file and what it imports
DuoForCausalLM.register_for_auto_class("AutoModelForCausalLM")
if __package__ == "duollm.models":  # and who loads such a copy registers it
    AutoModel.register(DuoConfig, DuoModel, exist_ok=True)
    AutoModelForCausalLM.register(DuoConfig, DuoForCausalLM, exist_ok=True)
