"""The evaluation stage: losses and routes of the oracle's tokens under every trained router."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from duollm.config import OracleConfig
from duollm.data.packed import PackedData, Windows
from duollm.evaluate.loading import load_model
from duollm.evaluate.losses import policy_losses
from duollm.files import replacing
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.models.policy import Policy
from duollm.routing.exact import ExactBudget
from duollm.routing.folder import load_router
from duollm.routing.space import RouteSpace


def evaluate_routers(
    model: DuoForCausalLM,
    names: Sequence[str],
    spend: Sequence[str],
    data: PackedData,
    config: OracleConfig,
    seed: int,
    run: Path,
) -> None:
    """Write `run/evaluate/<name>/<domain>.parquet` for the named routers in `run/routers`.

    The windows are the oracle's (docs/formats.md), so the rows of both stores correspond.

    Args:
        spend: how the budget is spent, "average" or "exact"; the exact variant's name ends in `_exact`.
    """
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
            evaluated = f"{name}_exact" if way == "exact" else name
            metadata = {"router": evaluated, **facts, "spend": way, "num_layers": space.num_layers}
            metadata["branches"] = [branch.name.lower() for branch in space.branches]
            for domain in data.domains:
                windows = data.windows("test", domain, config.documents, config.windows_per_document, seed)
                columns = _columns(backbone, policy, windows, space)
                table = pa.table(columns).replace_schema_metadata({"duollm": json.dumps(metadata)})
                with replacing(run / "evaluate" / evaluated / f"{domain}.parquet") as temporary:
                    pq.write_table(table, temporary, compression="zstd")


def _columns(model: DuoForCausalLM, policy: Policy, windows: Windows, space: RouteSpace) -> dict[str, Any]:
    token_ids_WT = torch.from_numpy(windows.token_ids).to(model.device)
    nll_WT, routes_WTL = policy_losses(model, token_ids_WT, policy=policy)
    columns = windows.columns()
    columns["nll"] = nll_WT.flatten().cpu().numpy()
    columns["route"] = space.encode(routes_WTL).flatten().cpu().numpy()
    return columns
