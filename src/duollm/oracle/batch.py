"""A batch of text prepared for search: embeddings, positions, padding, and what its tokens attend to.

Shape letters: B sequences, T tokens given, N = B * (T - 1) predicted tokens, L layers, D hidden,
S keys seen so far.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from duollm.models.branch import Branch
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.models.policy import FixedRoutes, check_routes
from duollm.oracle.contexts import CachedContext, Masks, SharedContext
from duollm.routes.space import RouteSpace


@dataclass
class Batch:
    """Token ids [B, T] to be searched; the last token is only a label.

    Attributes:
        ids_BT: the tokens that predict, [B, T - 1].
        labels_N: what they have to predict.
        padding_BT: where a prediction does not count, [B, T - 1].
        hidden_BTD: embeddings of the tokens that predict, as they enter the first layer.
    """

    model: DuoForCausalLM
    input_ids: Tensor
    attention_mask: Tensor | None = None
    ids_BT: Tensor = field(init=False)
    labels_N: Tensor = field(init=False)
    padding_BT: Tensor = field(init=False)
    hidden_BTD: Tensor = field(init=False)

    def __post_init__(self) -> None:
        given_BT = self.input_ids.new_ones(self.input_ids.shape) if self.attention_mask is None else self.attention_mask
        self.ids_BT, self.labels_N = self.input_ids[:, :-1], self.input_ids[:, 1:].flatten()
        self._mask_BT = given_BT[:, :-1].bool()
        self.padding_BT = ~(self._mask_BT & given_BT[:, 1:].bool())
        self._positions_BT = (self._mask_BT.long().cumsum(-1) - 1).clamp(min=0)
        embedded_BTD = self.model.model.embed_tokens(self.ids_BT)
        self.hidden_BTD, self._rotary = self.model.model.place(embedded_BTD, self._positions_BT)

    def states(self) -> Tensor:
        """Normalised final states of the predicting tokens with all layers big, [N, D]."""
        return self._forward(None, None).flatten(0, 1)

    def shared_context(self) -> SharedContext:
        """Every token attends to tokens on the same route."""
        plain = bool(self._mask_BT.all())
        visible: Masks = {
            window: None if plain and window is None else self._visible(window) for window in self._windows
        }
        return SharedContext(self._rotary, self.ids_BT.shape[1], visible)

    def reference_context(self, reference: Tensor | None) -> CachedContext:
        """Every token attends to tokens on the reference routes, [L] or [B, T, L]; default all big."""
        layers = self.model.config.num_hidden_layers
        given = torch.full((layers,), int(Branch.BIG)) if reference is None else reference
        routes = check_routes(given, len(self.input_ids), self.input_ids.shape[1], layers).to(self.input_ids.device)
        cache = DynamicCache()  # unlike the model's own, it keeps what has left a sliding window
        self._forward(routes if routes.ndim == 1 else routes[:, :-1], cache)
        hidden: Masks = {window: ~self._visible(window) for window in self._windows}
        return CachedContext.over(cache, self._groups, self._rotary, self.ids_BT.shape[1], hidden)

    def step_context(self, cache: DynamicCache, position: int) -> CachedContext:
        """The tokens at `position` attend to a cache of all earlier ones, and fill a free slot."""
        here = slice(position, position + 1)
        rotary = None if self._rotary is None else (self._rotary[0][:, here], self._rotary[1][:, here])
        plain = bool(self._mask_BT.all())
        hidden: Masks = {
            window: None
            if plain and (window is None or position < window)
            else ~self._visible(window)[:, here, : position + 1]
            for window in self._windows
        }
        if position == 0:
            config = self.model.config
            heads, _, width = config.attention_shape
            layers = [self.hidden_BTD.new_zeros(len(self.ids_BT), heads, 1, width)] * config.num_hidden_layers
            return CachedContext(rotary, 1, layers, layers, hidden)
        return CachedContext.over(cache, self._groups, rotary, 1, hidden, free_slots=1)

    def commit(self, cache: DynamicCache, position: int, routes_BL: Tensor) -> None:
        """Run the tokens at `position` on their routes, so that the cache holds them."""
        self.model.model(
            input_ids=self.ids_BT[:, position : position + 1],
            attention_mask=self._given_mask(position + 1),
            position_ids=self._positions_BT[:, position : position + 1],
            past_key_values=cache,
            use_cache=True,
            policy=FixedRoutes(routes_BL[:, None]),
        )

    def as_routes(self, space: RouteSpace, route_ids_BT: Tensor) -> Tensor:
        """Route ids of the predicting tokens as routes [B, T, L] of all tokens; the last token is big."""
        routes_BTL = torch.full((*self.input_ids.shape, space.num_layers), int(Branch.BIG))
        routes_BTL = routes_BTL.to(self.input_ids.device)
        routes_BTL[:, :-1] = space.decode(route_ids_BT.clamp(min=0))
        return routes_BTL

    def _forward(self, routes: Tensor | None, cache: DynamicCache | None) -> Tensor:
        return self.model.model(
            input_ids=self.ids_BT,
            attention_mask=self._given_mask(self.ids_BT.shape[1]),
            position_ids=self._positions_BT,
            past_key_values=cache,
            use_cache=cache is not None,
            policy=None if routes is None else FixedRoutes(routes),
        ).last_hidden_state

    def _given_mask(self, length: int) -> Tensor | None:
        return None if self._mask_BT.all() else self._mask_BT[:, :length].long()

    def _visible(self, window: int | None) -> Tensor:
        """Which keys each token sees, [B, T - 1, T - 1]; padding sees itself, so that its row holds numbers."""
        length, device = self.ids_BT.shape[1], self.ids_BT.device
        causal_TT = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        if window is not None:
            causal_TT = causal_TT.triu(1 - window)
        own_TT = torch.eye(length, dtype=torch.bool, device=device)
        return causal_TT & self._mask_BT[:, None] | own_TT

    @property
    def _windows(self) -> set[int | None]:
        """The widths of attention window among the layers."""
        return set(self.model.config.windows)

    @property
    def _groups(self) -> int:
        heads, key_value_heads, _ = self.model.config.attention_shape
        return heads // key_value_heads
