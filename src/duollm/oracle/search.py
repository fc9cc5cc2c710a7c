"""Exact oracle search: the public functions and what drives tree, context and judge.

Shape letters: B sequences, T tokens, N = B * (T - 1) predicted tokens, K budgets, R routes, D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from duollm.models.modeling_duo import DuoForCausalLM
from duollm.oracle.contexts import SharedContext
from duollm.oracle.head import HeadBound, log_normaliser
from duollm.oracle.reduce import Contest, Judge, RouteSums
from duollm.oracle.tree import Attend, Tree
from duollm.routing.sampling import draw_route_ids
from duollm.routing.space import RouteSpace, check_big_layers

CONTEXTS = ("shared",)


@dataclass(frozen=True)
class OracleResult:
    """The best route of every predicted token under every budget.

    Attributes:
        big_layers: the K budgets, exactly so many big layers.
        nll: float32 [K, B, T - 1], nats.
        route_ids: int64 [K, B, T - 1].
        random_nll: float32 [K, B, T - 1], the best of N random routes; None if not asked for.
        evaluated_share: share of leaves for which the full head was run.
    """

    big_layers: list[int]
    nll: Tensor
    route_ids: Tensor
    random_nll: Tensor | None
    evaluated_share: float


@torch.inference_mode()
def search_oracle(
    model: DuoForCausalLM,
    input_ids: Tensor,
    space: RouteSpace,
    context: str = "shared",
    big_layers: Sequence[int] | None = None,
    *,
    random_routes: int = 0,
    generator: torch.Generator | None = None,
    sums: RouteSums | None = None,
    memory_bytes: int = 2**30,
    prune: bool = True,
) -> OracleResult:
    """Find, for every predicted token, the route of lowest nll under each budget, over all routes.

    Args:
        input_ids: token ids [B, T], without padding; position t predicts token t + 1.
        context: which routes the earlier tokens take (docs/oracle.md).
        big_layers: budgets, exactly k big layers; default: every k from 0 to L.
        random_routes: also the best of so many random routes per token and budget.
        generator: source of the random routes, on the model's device.
        sums: filled with per-group sums over fixed patterns; the tokens it counts run the full head
            under every route.
        memory_bytes: budget for the search's tensors, the model not counted.
        prune: spare leaves that provably cannot win the full head; the result is the same.

    Raises:
        ValueError: illegal ids, context, space or budget; the message says what is allowed.
    """
    budgets = _check(model, input_ids, space, context, big_layers)
    labels_N = input_ids[:, 1:].flatten()
    label_ND = model.lm_head.weight[labels_N]
    contests = [Contest.open(label_ND, len(budgets))]
    if random_routes:
        drawn = [draw_route_ids(space, big, (len(labels_N), random_routes), generator) for big in budgets]
        contests.append(Contest.open(label_ND, len(budgets), torch.stack(drawn)))
    bound = HeadBound.around(model, _all_big_states(model, input_ids[:, :-1])) if prune else None
    judge = Judge(model, contests, bound, sums)
    _run(model, input_ids[:, :-1], space, frozenset(budgets), judge, memory_bytes)
    shape = (len(budgets), input_ids.shape[0], -1)
    return OracleResult(
        big_layers=budgets,
        nll=contests[0].nll_KN.view(shape),
        route_ids=contests[0].ids_KN.view(shape),
        random_nll=contests[1].nll_KN.view(shape) if random_routes else None,
        evaluated_share=judge.evaluated / judge.seen,
    )


@torch.inference_mode()
def loss_table(
    model: DuoForCausalLM,
    input_ids: Tensor,
    space: RouteSpace,
    context: str = "shared",
    *,
    memory_bytes: int = 2**30,
) -> Tensor:
    """Return the nll (nats) of every predicted token under every route, float32 [B, T - 1, R].

    The table itself takes 4 * B * (T - 1) * R bytes; `search_oracle` streams instead.
    """
    _check(model, input_ids, space, context, None)
    batch, tokens = input_ids.shape
    label_ND = model.lm_head.weight[input_ids[:, 1:].flatten()]
    table_NR = torch.empty(len(label_ND), space.size, device=input_ids.device)
    tree, attend, hidden_ND = _prepare(model, input_ids[:, :-1], space, memory_bytes)
    for leaves in tree.leaves(hidden_ND, attend):
        final_PND = model.model.norm(leaves.hidden_PND)
        log_z_PN = log_normaliser(model, final_PND.flatten(0, 1)).view(final_PND.shape[:2])
        table_NR[:, leaves.ids_P] = (log_z_PN - torch.einsum("pnd,nd->pn", final_PND, label_ND)).T
    return table_NR.view(batch, tokens - 1, space.size)


def _run(
    model: DuoForCausalLM,
    input_ids: Tensor,
    space: RouteSpace,
    budgets: frozenset[int],
    judge: Judge,
    memory_bytes: int,
) -> None:
    """Show every leaf with a wanted budget to the judge."""
    index_of = torch.full((space.num_layers + 1,), -1, device=input_ids.device)
    index_of[sorted(budgets)] = torch.arange(len(budgets), device=input_ids.device)
    tree, attend, hidden_ND = _prepare(model, input_ids, space, memory_bytes, budgets)
    for leaves in tree.leaves(hidden_ND, attend):
        judge.update(leaves.ids_P, index_of[leaves.big_P], model.model.norm(leaves.hidden_PND))


def _prepare(
    model: DuoForCausalLM,
    input_ids: Tensor,
    space: RouteSpace,
    memory_bytes: int,
    budgets: frozenset[int] | None = None,
) -> tuple[Tree, Attend, Tensor]:
    """The tree, the shared context and the embeddings of the tokens [N, D]."""
    hidden_BTD = model.model.embed_tokens(input_ids)
    positions_BT = torch.arange(input_ids.shape[1], device=input_ids.device).expand(len(input_ids), -1)
    rotary = model.model.rotary_emb(hidden_BTD, position_ids=positions_BT)
    budgets = budgets if budgets is not None else frozenset(range(space.num_layers + 1))
    tree = Tree(model.model, space, budgets, max_rows_for(model, space, memory_bytes))
    return tree, SharedContext(rotary), hidden_BTD.flatten(0, 1)


def max_rows_for(model: DuoForCausalLM, space: RouteSpace, memory_bytes: int) -> int:
    """How many hidden vectors a block may hold within the memory budget, and where larger does not pay."""
    config = model.config
    kept_per_level = (space.base + 1) * config.hidden_size
    working = 8 * config.hidden_size + 3 * config.intermediate_size
    row_bytes = 4 * (space.num_layers * kept_per_level + working)
    return max(1, min(memory_bytes // row_bytes, 4096))


def _all_big_states(model: DuoForCausalLM, input_ids: Tensor) -> Tensor:
    """Normalised final states [N, D] with every layer big."""
    return model.model(input_ids=input_ids).last_hidden_state.flatten(0, 1)


def _check(
    model: DuoForCausalLM, input_ids: Tensor, space: RouteSpace, context: str, big_layers: Sequence[int] | None
) -> list[int]:
    """Return the budgets, ascending order kept as given, or raise a ValueError that says what is allowed."""
    if context not in CONTEXTS:
        raise ValueError(f"context must be one of {', '.join(CONTEXTS)}, got {context!r}")
    if space.num_layers != model.config.num_hidden_layers:
        raise ValueError(
            f"the route space has {space.num_layers} layers, the model {model.config.num_hidden_layers}; "
            "make them equal"
        )
    if input_ids.ndim != 2 or input_ids.shape[1] < 2:
        raise ValueError(f"input_ids must be [B, T] with T >= 2, got shape {list(input_ids.shape)}")
    if input_ids.min() < 0 or input_ids.max() >= model.config.vocab_size:
        raise ValueError(
            f"token ids must be in 0 .. {model.config.vocab_size - 1}, "
            f"got {input_ids.min().item()} .. {input_ids.max().item()}"
        )
    budgets = list(range(space.num_layers + 1)) if big_layers is None else [int(big) for big in big_layers]
    if not budgets or len(set(budgets)) != len(budgets):
        raise ValueError(f"big_layers must hold one or more different budgets, got {budgets}")
    for big in budgets:
        check_big_layers(space, big)
    return budgets
