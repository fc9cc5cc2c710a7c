"""The evaluation stage: losses and routes of the text of the comparison under every trained router, and what they cost.

Shape letters: W windows, T tokens, L layers.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from duollm.config import EvaluateConfig
from duollm.convert.saving import load_model
from duollm.data.packed import PackedData, Windows
from duollm.evaluate.losses import policy_losses
from duollm.evaluate.sweep import branch_shares
from duollm.evaluate.timing import Contender, Stopwatch, fixed_contenders
from duollm.files import replacing
from duollm.flops import mean_token_flops
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.routers.base import Router, branch_costs
from duollm.routers.calibration import ExactBudget
from duollm.routers.registry import load_router
from duollm.routes.space import RouteSpace


def evaluate_routers(
    model: DuoForCausalLM,
    names: Sequence[str],
    spend: Sequence[str],
    data: PackedData,
    text: EvaluateConfig,
    seed: int,
    run: Path,
) -> None:
    """Write `run/evaluate/<name>/<domain>.parquet` for the named routers in `run/routers`, and `timing.json`.

    The oracle's windows are among them (docs/formats.md), so its rows are found again.

    Args:
        spend: how the budget is spent, "average" or "exact"; the exact variant's name ends in `_exact`.
    """
    tested = {
        domain: data.windows("test", domain, text.documents, text.windows_per_document, seed) for domain in data.domains
    }
    timed_BT = torch.cat([torch.from_numpy(windows.token_ids) for windows in tested.values()]).to(model.device)
    stopwatch = Stopwatch(model, timed_BT)
    budgets: set[int] = set()
    for one in _evaluated(model, names, spend, run):
        for domain, windows in tested.items():
            table = _table(one, windows)
            with replacing(run / "evaluate" / one.facts["router"] / f"{domain}.parquet") as temporary:
                pq.write_table(table, temporary, compression="zstd")
        named = {key: one.facts[key] for key in ("kind", "spend", "big_layers")}
        stopwatch.measure(Contender({"policy": one.facts["router"], **named}, one.policy, model=one.backbone))
        budgets.add(one.facts["big_layers"])
    for contender in fixed_contenders(model, sorted(budgets), stopwatch.token_ids_BT.shape):
        stopwatch.measure(contender)
    stopwatch.write(run / "evaluate" / "timing.json")


class _Evaluated(NamedTuple):
    """A router with one way of spending, the model that it routes, and what its files say of it."""

    policy: Router | ExactBudget
    backbone: DuoForCausalLM
    space: RouteSpace
    facts: dict[str, Any]


def _evaluated(model: DuoForCausalLM, names: Sequence[str], spend: Sequence[str], run: Path) -> Iterator[_Evaluated]:
    """Load the routers one by one; those trained together with the model come with their own."""
    for name in names:
        router, facts = load_router(run / "routers" / name, model.config)
        router.to(model.device)
        together = run / "routers" / name / "model"
        backbone = load_model(together) if together.exists() else model
        nn.Module.to(backbone, model.device)
        branches = sorted({*router.branches, *RouteSpace(1).branches})
        space = RouteSpace(model.config.num_hidden_layers, tuple(branches))
        for way in spend:
            policy = ExactBudget(router, facts["big_layers"]) if way == "exact" else router
            yield _Evaluated(
                policy,
                backbone,
                space,
                {
                    "router": f"{name}_exact" if way == "exact" else name,
                    **facts,
                    "spend": way,
                    "num_layers": space.num_layers,
                    "branches": [branch.name.lower() for branch in space.branches],
                    "branch_costs": branch_costs(model.config).tolist(),
                    "router_flops_per_token": policy.flops_per_token(),
                },
            )


def _table(one: _Evaluated, windows: Windows) -> pa.Table:
    token_ids_WT = torch.from_numpy(windows.token_ids).to(one.backbone.device)
    nll_WT, routes_WTL = policy_losses(one.backbone, token_ids_WT, policy=one.policy)
    columns = windows.columns()
    columns["nll"] = nll_WT.flatten().cpu().numpy()
    columns["route"] = one.space.encode(routes_WTL).flatten().cpu().numpy()
    facts = one.facts | {"flops_per_token": _flops_per_token(one, routes_WTL)}
    return pa.table(columns).replace_schema_metadata({"duollm": json.dumps(facts)})


def _flops_per_token(one: _Evaluated, routes_WTL: Tensor) -> float:
    """Mean forward FLOPs under these routes, the router's own included."""
    length = routes_WTL.shape[1] + 1
    model = mean_token_flops(one.backbone.config, branch_shares(routes_WTL), length)
    return model + float(one.facts["router_flops_per_token"])
