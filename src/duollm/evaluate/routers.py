"""The evaluation stage: losses and routes of the oracle's tokens under every trained router."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from duollm.config import OracleConfig
from duollm.data.packed import PackedData
from duollm.evaluate.loading import load_model
from duollm.evaluate.losses import policy_losses
from duollm.files import replacing
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.routing.folder import load_router
from duollm.routing.space import RouteSpace


def evaluate_routers(
    model: DuoForCausalLM, names: list[str], data: PackedData, config: OracleConfig, seed: int, run: Path
) -> None:
    """Write `run/evaluate/<router>/<domain>.parquet` for the named routers in `run/routers`.

    The windows are the oracle's (docs/formats.md), so the rows of both stores correspond.
    """
    space = RouteSpace(model.config.num_hidden_layers)
    for name in names:
        router, facts = load_router(run / "routers" / name, model.config)
        router.to(model.device)
        together = run / "routers" / name / "model"
        backbone = load_model(together) if together.exists() else model
        nn.Module.to(backbone, model.device)
        for domain in data.domains:
            windows = data.windows("test", domain, config.documents, config.windows_per_document, seed)
            token_ids_WT = torch.from_numpy(windows.token_ids).to(model.device)
            nll_WT, routes_WTL = policy_losses(backbone, token_ids_WT, policy=router)
            columns = windows.columns()
            columns["nll"] = nll_WT.flatten().cpu().numpy()
            columns["route"] = space.encode(routes_WTL).flatten().cpu().numpy()
            metadata = {
                "router": name,
                **facts,
                "num_layers": space.num_layers,
                "branches": [branch.name.lower() for branch in space.branches],
            }
            table = pa.table(columns).replace_schema_metadata({"duollm": json.dumps(metadata)})
            with replacing(run / "evaluate" / name / f"{domain}.parquet") as temporary:
                pq.write_table(table, temporary, compression="zstd")
