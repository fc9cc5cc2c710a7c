"""The predictable ceiling on the text of the comparison: predicted gains become routes, and these are executed.

Shape letters: W windows, B windows per forward, T tokens, L layers.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from duollm.ceiling.predictor import GainPredictor
from duollm.ceiling.routes import CeilingPolicy, choose, predicted_margins, price_for
from duollm.config import EvaluateConfig
from duollm.data.packed import PackedData
from duollm.evaluate.losses import policy_losses
from duollm.files import replacing
from duollm.models.branch import Branch
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.routes.space import RouteSpace

_VALIDATION_WINDOWS = 64
"""Few, for every policy is executed on them."""


def evaluate_ceiling(
    model: DuoForCausalLM,
    predictors: nn.ModuleDict,
    big_layers: Sequence[int],
    branches: Sequence[Branch],
    data: PackedData,
    text: EvaluateConfig,
    seed: int,
    run: Path,
) -> None:
    """Write `run/ceiling/` (docs/formats.md): the losses of predicted routes on the text of the comparison.

    Prices and the choice among depths come from validation documents.
    """
    space = RouteSpace(model.config.num_hidden_layers, tuple(branches))
    sample = data.balanced_sample("validation", _VALIDATION_WINDOWS, text.windows_per_document, seed)
    validation_WT = torch.from_numpy(sample).to(model.device)
    policies = choose(_on_validation(model, predictors, big_layers, space, validation_WT))
    facts = {
        "num_layers": space.num_layers,
        "branches": [branch.name.lower() for branch in space.branches],
        "policies": [asdict(policy) | {"column": policy.column} for policy in policies],
    }
    with replacing(run / "ceiling") as folder:
        folder.mkdir()
        save_file(predictors.state_dict(), folder / "predictors.safetensors")
        for domain in data.domains:
            windows = data.windows("test", domain, text.documents, text.windows_per_document, seed)
            token_ids_WT = torch.from_numpy(windows.token_ids).to(model.device)
            columns = windows.columns() | _columns(model, predictors, policies, space, token_ids_WT)
            table = pa.table(columns).replace_schema_metadata({"duollm": json.dumps(facts)})
            pq.write_table(table, folder / f"{domain}.parquet", compression="zstd")


def _on_validation(
    model: DuoForCausalLM,
    predictors: nn.ModuleDict,
    big_layers: Sequence[int],
    space: RouteSpace,
    token_ids_WT: Tensor,
) -> list[CeilingPolicy]:
    """Price and score every policy."""
    found = predicted_margins(model, predictors, big_layers, space, token_ids_WT)
    policies = []
    for (name, k), (margin_WTL, _) in found.items():
        for spend, price in (("average", price_for(margin_WTL, k)), ("exact", None)):
            policy = CeilingPolicy(name, cast(GainPredictor, predictors[name]).depth, spend, k, price)
            nll_WT, _ = policy_losses(model, token_ids_WT, routes=policy.routes(found))
            policies.append(replace(policy, validation_nll=nll_WT.mean().item()))
    return policies


def _columns(
    model: DuoForCausalLM,
    predictors: nn.ModuleDict,
    policies: Sequence[CeilingPolicy],
    space: RouteSpace,
    token_ids_WT: Tensor,
) -> dict[str, Any]:
    """Execute the routes of every policy, those of all tokens together."""
    big_layers = list(dict.fromkeys(policy.big_layers for policy in policies))
    found = predicted_margins(model, predictors, big_layers, space, token_ids_WT)
    columns: dict[str, Any] = {}
    for policy in policies:
        nll_WT, routes_WTL = policy_losses(model, token_ids_WT, routes=policy.routes(found))
        columns[f"nll_{policy.column}"] = nll_WT.flatten().cpu().numpy()
        columns[f"route_{policy.column}"] = space.encode(routes_WTL).flatten().cpu().numpy()
    return columns
