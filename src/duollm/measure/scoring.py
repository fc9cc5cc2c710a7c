"""Losses, routes, cost and speed of text under policies that are named, or swept over a budget.

Shape letters: W windows, T tokens, L layers.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray

from duollm.data.packed import Windows
from duollm.errors import UserError, did_you_mean
from duollm.flops import mean_token_flops
from duollm.measure.executor import branch_shares, deciding_flops, policy_losses, route_digits
from duollm.models.branch import Branch
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.models.policy import Policy

SWEEPS = ("spread", "random", "first", "last")
"""Kinds of policies that can be swept over the share of big."""


class Routed(NamedTuple):
    """A model, the policy that routes it, and how the user named that policy."""

    name: str
    model: DuoForCausalLM
    policy: Policy


@dataclass(frozen=True)
class Scored:
    """One policy on one domain.

    Attributes:
        columns: `Windows.columns()`, and of every predicted token `nll` (nats) and `route`, the digits of
            the route of the token that predicts it ("112": big in the last of three layers).
        big_share: big among all (token, layer).
        relative_flops: forward FLOPs per token, output head and a router's own included, over those of all big.
        tokens_per_second: speed of scoring.
    """

    policy: str
    columns: dict[str, NDArray[Any]]
    big_share: float
    relative_flops: float
    tokens_per_second: float


def sweep_policies(kind: str, shares: Sequence[float], num_layers: int) -> list[str]:
    """Name the policies of one kind at given shares of big, to whole layers unless `kind` is random.

    Raises:
        UserError: unknown kind, or a share outside 0 .. 1.
    """
    if kind not in SWEEPS:
        raise UserError(f"--sweep {kind}: {did_you_mean(kind, SWEEPS)}")
    for share in shares:
        if not 0 <= share <= 1:
            raise UserError(f"--shares holds {share:g}; shares of big are in 0 .. 1")
    return [f"{kind}:{f'{share:g}' if kind == 'random' else round(share * num_layers)}" for share in shares]


def score(routed: Sequence[Routed], windows: Windows, batch_size: int) -> Iterator[Scored]:
    """Run the windows through every model under its policy."""
    warm = None
    for name, model, policy in routed:
        token_ids_WT = torch.from_numpy(windows.token_ids).to(model.device)
        if model is not warm:
            policy_losses(model, token_ids_WT[:batch_size], policy=policy)  # a model's first run allocates; not timed
            warm = model
        start = time.perf_counter()
        nll_WT, routes_WTL = policy_losses(model, token_ids_WT, policy=policy, batch_size=batch_size)
        nll = nll_WT.flatten().cpu().numpy()  # waits for the device
        seconds = time.perf_counter() - start
        columns = windows.columns() | {"nll": nll, "route": route_digits(routes_WTL.flatten(0, 1))}
        shares = branch_shares(routes_WTL)
        flops = relative_flops(model, shares, windows.token_ids.shape[1], deciding_flops(policy))
        yield Scored(name, columns, shares[Branch.BIG], flops, token_ids_WT.numel() / seconds)


def relative_flops(
    model: DuoForCausalLM, shares: tuple[float, float, float], sequence_length: int, deciding: int = 0
) -> float:
    """Forward FLOPs with these shares of (skip, small, big), and `deciding` ones per token, over those of all big."""
    all_big = mean_token_flops(model.config, (0, 0, 1), sequence_length)
    return (mean_token_flops(model.config, shares, sequence_length) + deciding) / all_big
