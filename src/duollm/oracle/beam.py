"""Beam over layers: keep the prefixes that promise most, at a cost that grows linearly with depth.

A prefix promises what its hidden state would lead to if the remaining layers added to it what they
add on the reference route, all layers big; the loss of that is estimated with the head's lower
bound, so no prefix runs the full head. Prefixes compete only with those that have as many big
layers, else all would spend their budget first thing. Tokens that must share prefixes (context
"shared") keep those that together serve them best.

Shape letters: P prefixes, N tokens, G groups of tokens that share prefixes, U tokens in a group,
M candidates, W chosen candidates, D hidden, C branches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Unpack

import torch
from torch import Tensor

from duollm.models.branch import Branch
from duollm.models.modeling_duo import DuoDecoderLayer, DuoForCausalLM
from duollm.oracle.approximate import Limit, Options, allowed_bigs, search_with
from duollm.oracle.result import OracleResult
from duollm.oracle.tree import branch_out, decoder_layers
from duollm.oracle.trial import Trial
from duollm.routes.space import RouteSpace


def beam_search(
    model: DuoForCausalLM,
    input_ids: Tensor,
    space: RouteSpace,
    context: str = "shared",
    big_layers: Sequence[int] | None = None,
    *,
    width: int = 64,
    **options: Unpack[Options],
) -> OracleResult:
    """Find, for every predicted token, a good route within each budget with a beam over the layers.

    The beam is a token's own in contexts "reference" and "committed", a sequence's in "shared". It
    serves all budgets together and holds `width` prefixes, divided between the numbers of big layers
    from which a budget can still be met (at least one each), so time grows with width * L.

    Args:
        width: how many prefixes to keep after each layer, over all budgets.

    The other arguments are those of `search_oracle` and `Options`. Hidden states take
    width * (C + 1) * N * D * 4 bytes, whatever `memory_bytes` says.

    Raises:
        ValueError: as `search_oracle`; a budget that is neither `Exactly` nor `AtMost`.
    """
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")

    def method(trial: Trial, limits: list[Limit], generator: torch.Generator) -> None:
        bigs = sorted({big for limit in limits for big in allowed_bigs(limit)})
        _Beam(trial, torch.tensor(bigs, device=trial.rows_N.device), width).search()

    return search_with(method, model, input_ids, space, context, big_layers, **options)


@dataclass(frozen=True)
class _Prefixes:
    """Prefixes of one depth; each group has its own, but all have as many big layers in a row.

    Attributes:
        ids_PG: as numbers in base C.
        big_P: how many layers were big so far.
        hidden_PND: hidden states after the layers so far.
    """

    ids_PG: Tensor
    big_P: Tensor
    hidden_PND: Tensor

    def where(self, kept_P: Tensor) -> "_Prefixes":
        """Some of the rows."""
        return _Prefixes(self.ids_PG[kept_P], self.big_P[kept_P], self.hidden_PND[kept_P])

    def choose(self, rows_WG: Tensor) -> "_Prefixes":
        """Let every group choose rows of its own; those beside each other have as many big layers."""
        groups = rows_WG.shape[1]
        hidden_PGUD = self.hidden_PND.unflatten(1, (groups, -1))
        chosen_WGUD = hidden_PGUD[rows_WG, torch.arange(groups, device=rows_WG.device)]
        return _Prefixes(self.ids_PG.gather(0, rows_WG), self.big_P[rows_WG[:, 0]], chosen_WGUD.flatten(1, 2))


@dataclass(frozen=True)
class _Beam:
    """One walk from the first layer to the last.

    Attributes:
        bigs_K: the numbers of big layers with which a route may end.
    """

    trial: Trial
    bigs_K: Tensor
    width: int

    def search(self) -> None:
        """Walk, and enter the routes that reach the end."""
        trial, layers = self.trial, decoder_layers(self.trial.model.model)
        all_big_1G = self.bigs_K.new_full((1, trial.groups), trial.cells.space.size - 1)
        completed_1ND = [*trial.follow(all_big_1G)]
        prefixes = _Prefixes(torch.zeros_like(all_big_1G), self.bigs_K.new_zeros(1), trial.hidden_ND[None])
        for depth, layer in enumerate(layers, start=1):
            children = self._expand(prefixes, layer)
            children = children.where(self._in_reach(children.big_P, remaining=len(layers) - depth))
            if depth < len(layers):
                promise_MN = self._promise(children, completed_1ND[-1] - completed_1ND[depth])
                prefixes = children.choose(self._best(children.big_P, promise_MN))
        for ids_PG, hidden_PND in zip(self._parts(children.ids_PG), self._parts(children.hidden_PND), strict=True):
            trial.enter(ids_PG, hidden_PND)

    def _expand(self, prefixes: _Prefixes, layer: DuoDecoderLayer) -> _Prefixes:
        """Send prefixes through a layer, once per branch."""
        branches, device = self.trial.cells.space.branches, self.bigs_K.device
        parts = [branch_out(layer, each, self.trial.attend, branches) for each in self._parts(prefixes.hidden_PND)]
        digits_C1 = torch.arange(len(branches), device=device)[:, None]
        spends_C = torch.tensor([branch == Branch.BIG for branch in branches], device=device)
        return _Prefixes(
            (prefixes.ids_PG[:, None] * len(branches) + digits_C1).flatten(0, 1),
            (prefixes.big_P[:, None] + spends_C).flatten(),
            torch.cat(parts).flatten(0, 1),
        )

    def _in_reach(self, big_P: Tensor, remaining: int) -> Tensor:
        """From which prefixes some budget can still be met, bool [P]."""
        missing_PK = self.bigs_K - big_P[:, None]
        return ((missing_PK >= 0) & (missing_PK <= remaining)).any(-1)

    def _promise(self, prefixes: _Prefixes, rest_1ND: Tensor) -> Tensor:
        """Estimated nll [P, N] if the remaining layers add `rest_1ND`."""
        return torch.cat([self.trial.estimate(part + rest_1ND) for part in self._parts(prefixes.hidden_PND)])

    def _best(self, big_M: Tensor, promise_MN: Tensor) -> Tensor:
        """The rows that each group keeps, [W, G]: a quota of every number of big layers."""
        promise_MGU = promise_MN.where(self.trial.counted_N, 0).unflatten(1, (self.trial.groups, -1))
        strata = [(big_M == big).nonzero()[:, 0] for big in big_M.unique()]
        quotas = _divide(self.width, [len(rows) for rows in strata])
        return torch.cat([rows[_keep(promise_MGU[rows], quota)] for rows, quota in zip(strata, quotas, strict=True)])

    def _parts(self, tensor_PX: Tensor) -> tuple[Tensor, ...]:
        """Split prefixes so that a part's hidden states fit the row limit."""
        return tensor_PX.split(max(1, self.trial.max_rows // len(self.trial.rows_N)))


def _divide(width: int, candidates: list[int]) -> list[int]:
    """Divide the width between strata: at least one each, no more than it has, else as equally as can be."""
    quotas = [0] * len(candidates)
    for served, stratum in enumerate(sorted(range(len(candidates)), key=lambda each: candidates[each])):
        fair = (width - sum(quotas)) // (len(candidates) - served)
        quotas[stratum] = min(candidates[stratum], max(1, fair))
    return quotas


def _keep(promise_MGU: Tensor, quota: int) -> Tensor:
    """The candidates that each group keeps, [quota, G]."""
    if promise_MGU.shape[-1] == 1:
        return promise_MGU[..., 0].sort(dim=0, stable=True).indices[:quota]
    return _cover(promise_MGU, quota)


def _cover(promise_MGU: Tensor, quota: int) -> Tensor:
    """Candidates [quota, G] chosen one by one so that the sum over the tokens of the lowest falls most."""
    groups = torch.arange(promise_MGU.shape[1], device=promise_MGU.device)
    lowest_GU = promise_MGU.new_full(promise_MGU.shape[1:], torch.finfo(promise_MGU.dtype).max / promise_MGU.shape[2])
    left_MG = torch.zeros(promise_MGU.shape[:2], device=promise_MGU.device)
    chosen = []
    for _ in range(quota):
        chosen_G = (torch.minimum(promise_MGU, lowest_GU).sum(-1) + left_MG).argmin(0)
        lowest_GU = torch.minimum(lowest_GU, promise_MGU[chosen_G, groups])
        left_MG[chosen_G, groups] = torch.inf
        chosen.append(chosen_G)
    return torch.stack(chosen)
