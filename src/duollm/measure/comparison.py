"""Measures trained routers and fixed patterns on the text of the comparison.

Shape letters: W windows, U documents, R routes.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from duollm.config import EvaluateConfig
from duollm.data.packed import PackedData, Windows
from duollm.flops import mean_token_flops
from duollm.measure.executor import branch_shares, deciding_flops, policy_losses, token_columns
from duollm.measure.timing import Timer, Workload, fixed_workloads
from duollm.models.branch import Branch
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.models.policy import Policy
from duollm.records.files import KINDS, ResultFile, write_result
from duollm.records.patterns import pattern_columns
from duollm.routes.space import RouteSpace
from duollm.terminal import show

_CANDIDATES = 3
"""Patterns per budget. The oracle's tokens tell the best from the bad, but hardly from the second."""


class TrainedRouter(NamedTuple):
    """A router with one way of spending its budget.

    Attributes:
        name: name of its folder of results.
        model: the model that it routes.
        branches: the branches that its routes may hold.
        facts: metadata of its files: `kind`, `spend`, `big_layers`, `branch_costs`, and how it was trained.
    """

    name: str
    model: DuoForCausalLM
    policy: Policy
    branches: tuple[Branch, ...]
    facts: dict[str, Any]


def compared_windows(data: PackedData, text: EvaluateConfig, seed: int) -> dict[str, Windows]:
    """Return the text of the comparison by domain. The oracle's text is a part of it."""
    size = text.documents, text.windows_per_document
    return {domain: data.windows("test", domain, *size, seed) for domain in data.domains}


def compare_routers(
    model: DuoForCausalLM, routers: Iterable[TrainedRouter], texts: Mapping[str, Windows], lowest: Branch, run: Path
) -> None:
    """Write `run/evaluate/<name>/<domain>.parquet` for every router, and the times of routers and patterns.

    Args:
        lowest: the branch that patterns take where they are not big.
    """
    timed_BT = torch.cat([torch.from_numpy(windows.token_ids) for windows in texts.values()]).to(model.device)
    timer = Timer(model, timed_BT, lowest)
    budgets: set[int] = set()
    for router in routers:
        for domain, windows in texts.items():
            columns, facts = _measured(router, windows)
            write_result(run / "evaluate" / router.name / f"{domain}.parquet", windows.columns() | columns, facts)
        named = {"policy": router.name} | {key: router.facts[key] for key in ("kind", "spend", "big_layers")}
        timer.measure(Workload(named, router.policy, model=router.model))
        budgets.add(router.facts["big_layers"])
    for workload in fixed_workloads(model, sorted(budgets), timer.token_ids_BT.shape, lowest):
        timer.measure(workload)
    timer.write(run / "evaluate" / "timing.json")


def _measured(router: TrainedRouter, windows: Windows) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the columns of a router on some text, and its facts with what a forward costs under its routes."""
    config, own = router.model.config, deciding_flops(router.policy)
    token_ids_WT = torch.from_numpy(windows.token_ids).to(router.model.device)
    nll_WT, routes_WTL = policy_losses(router.model, token_ids_WT, policy=router.policy)
    space = RouteSpace(config.num_hidden_layers, router.branches)
    facts = router.facts | {
        "router": router.name,
        **space.facts,
        "router_flops_per_token": own,
        "flops_per_token": own + mean_token_flops(config, branch_shares(routes_WTL), token_ids_WT.shape[1]),
    }
    return token_columns(nll_WT, routes_WTL, space), facts


def compare_patterns(model: DuoForCausalLM, texts: Mapping[str, Windows], run: Path) -> None:
    """Write `run/evaluate/<domain>.routes.parquet`: losses per document of the candidates for static.

    For each number of big layers, the candidates have the lowest loss on the oracle's tokens of all domains. These
    tokens are a part of the text, which favours static, if anything.
    """
    folder, ending = run / "oracle", KINDS["routes"]
    searched = [ResultFile.open(folder / f"{domain}{ending}.parquet", "duollm oracle", folder) for domain in texts]
    space = searched[0].space()
    of_route = pa.concat_tables([file.table.select(["route", "nll_sum"]) for file in searched]).group_by("route")
    sums = of_route.aggregate([("nll_sum", "sum")])
    chosen_R = candidates(sums["route"].to_numpy(), sums["nll_sum_sum"].to_numpy(), space)
    facts = space.facts
    for domain, windows in texts.items():
        token_ids_WT = torch.from_numpy(windows.token_ids).to(model.device)
        names, document_W = np.unique(windows.documents, return_inverse=True)
        nll_RU: list[NDArray[Any]] = []
        for route_L in space.decode(torch.from_numpy(chosen_R)).to(model.device):
            show(f"fixed patterns on {domain}", len(nll_RU), len(chosen_R), unit="patterns")
            nll_WT, _ = policy_losses(model, token_ids_WT, routes=route_L)
            nll_RU.append(np.bincount(document_W, nll_WT.double().sum(1).cpu().numpy()))
        tokens_U = np.bincount(document_W) * (token_ids_WT.shape[1] - 1)
        columns = pattern_columns(names.tolist(), chosen_R, np.stack(nll_RU, axis=1), tokens_U)
        write_result(run / "evaluate" / f"{domain}{ending}.parquet", columns, facts)


def candidates(route_R: NDArray[np.int64], nll_R: NDArray[np.float64], space: RouteSpace) -> NDArray[np.int64]:
    """Return the ids, ascending, of the few routes with the lowest loss for each number of big layers."""
    ranked_R = route_R[np.argsort(nll_R, kind="stable")]
    big_R = space.count_big(ranked_R)
    return np.sort(np.concatenate([ranked_R[big_R == big][:_CANDIDATES] for big in np.unique(big_R)]))
