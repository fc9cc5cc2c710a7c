"""The naive truth of the oracle: one whole forward pass per route, plain loops.

Shape letters: B sequences, T tokens, L layers, R routes.
"""

import torch
from torch import Tensor

from duollm import Branch, DuoConfig, DuoForCausalLM, RouteSpace

SKIP, SMALL, BIG = Branch
GROUPED = {
    "groups": RouteSpace(5, (SMALL, BIG), [[0, 1], [2], [3, 4]]),
    "two groups": RouteSpace(4, (SKIP, BIG), 2),
    "groups with fixed": RouteSpace(5, (SKIP, SMALL, BIG), [[1, 2], [4]], {0: SMALL, 3: BIG}),
    "interleaved groups": RouteSpace(5, (SKIP, BIG), [[2, 4], [1, 3]], {0: SKIP}),
    "fixed alone": RouteSpace(4, (SMALL, BIG), None, {1: BIG, 3: SKIP}),
}
"""Spaces in which layers vary together, or not at all."""


def tiny_model(num_layers: int = 3, skip_scope: str = "ffn", key_value_heads: int = 2, seed: int = 0) -> DuoForCausalLM:
    """A random model whose branches differ visibly."""
    torch.manual_seed(seed)
    config = DuoConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=key_value_heads,
        intermediate_size=48,
        small_intermediate_size=8,
        initializer_range=0.3,
        skip_scope=skip_scope,
    )
    return DuoForCausalLM(config).eval()


def tiny_tokens(batch: int = 2, length: int = 6, seed: int = 1) -> Tensor:
    """Random token ids [B, T]."""
    return torch.randint(97, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def forward_nll(model: DuoForCausalLM, input_ids: Tensor, routes: Tensor, mask: Tensor | None = None) -> Tensor:
    """Losses [B, T - 1] of one ordinary forward pass."""
    positions = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(input_ids=input_ids, attention_mask=mask, position_ids=positions, routes=routes).logits[:, :-1]
    return -logits.log_softmax(-1).gather(-1, input_ids[:, 1:, None])[..., 0]


def naive_table(
    model: DuoForCausalLM,
    input_ids: Tensor,
    space: RouteSpace,
    context: str,
    reference: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Losses [B, T - 1, R]: context "shared" or "reference" (default reference: all big)."""
    routes_RL = space.decode(torch.arange(space.size))
    if context == "shared":
        return torch.stack([forward_nll(model, input_ids, route, mask) for route in routes_RL], dim=-1)
    batch, length = input_ids.shape
    reference = torch.full((space.num_layers,), 2) if reference is None else reference
    table = torch.empty(batch, length - 1, space.size)
    for token in range(length - 1):
        for index, route in enumerate(routes_RL):
            routes = reference.expand(batch, length, -1).clone()
            routes[:, token] = route
            table[:, token, index] = forward_nll(model, input_ids, routes, mask)[:, token]
    return table


def naive_committed(
    model: DuoForCausalLM, input_ids: Tensor, space: RouteSpace, allowed: list[Tensor], mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Left to right over route ids `allowed[t]`: losses and route ids, [B, T - 1]."""
    batch, length = input_ids.shape
    routes = torch.full((batch, length, space.num_layers), 2)
    nll, ids = torch.empty(batch, length - 1), torch.empty(batch, length - 1, dtype=torch.long)
    for token in range(length - 1):
        tried = []
        for route in space.decode(allowed[token]):
            routes[:, token] = route
            tried.append(forward_nll(model, input_ids, routes, mask)[:, token])
        nll[:, token], best = torch.stack(tried).min(0)
        ids[:, token] = allowed[token][best]
        routes[:, token] = space.decode(ids[:, token])
    return nll, ids
