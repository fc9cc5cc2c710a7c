"""Fixed patterns on the text of the comparison, on which static is chosen and scored.

Shape letters: W windows, R routes.
"""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from duollm.config import EvaluateConfig
from duollm.data.packed import PackedData
from duollm.evaluate.losses import policy_losses
from duollm.files import replacing
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.records.files import KINDS
from duollm.routes.space import RouteSpace, parse_branches

_CANDIDATES = 3
"""Patterns per budget. The oracle's tokens tell the best from the bad, but hardly from the second."""


def evaluate_patterns(model: DuoForCausalLM, data: PackedData, text: EvaluateConfig, seed: int, run: Path) -> None:
    """Write `run/evaluate/<domain>.routes.parquet`: losses per document of the patterns that may be static.

    They are, of each number of big layers, those of lowest loss on the oracle's tokens of all domains: tokens that are
    part of this text, which favours static, if anything.
    """
    searched = [pq.read_table(run / "oracle" / f"{domain}{KINDS['routes']}.parquet") for domain in data.domains]
    known = json.loads(searched[0].schema.metadata[b"duollm"])
    space = RouteSpace(known["num_layers"], parse_branches(known["branches"]))
    of_route = pa.concat_tables([table.select(["route", "nll_sum"]) for table in searched]).group_by("route")
    sums = of_route.aggregate([("nll_sum", "sum")])
    chosen_R = candidates(sums["route"].to_numpy(), sums["nll_sum_sum"].to_numpy(), space)
    for domain in data.domains:
        windows = data.windows("test", domain, text.documents, text.windows_per_document, seed)
        token_ids_WT = torch.from_numpy(windows.token_ids).to(model.device)
        names, document_W = np.unique(windows.documents, return_inverse=True)
        nll_RD = []
        for route_L in space.decode(torch.from_numpy(chosen_R)).to(model.device):
            nll_WT, _ = policy_losses(model, token_ids_WT, routes=route_L)
            nll_RD.append(np.bincount(document_W, nll_WT.double().sum(1).cpu().numpy()))
        columns = {
            "document": np.tile(names, len(chosen_R)),
            "route": np.repeat(chosen_R, len(names)),
            "nll_sum": np.concatenate(nll_RD),
            "tokens": np.tile(np.bincount(document_W) * nll_WT.shape[1], len(chosen_R)),
        }
        facts = {"num_layers": space.num_layers, "branches": known["branches"]}
        with replacing(run / "evaluate" / f"{domain}{KINDS['routes']}.parquet") as temporary:
            table = pa.table(columns).replace_schema_metadata({"duollm": json.dumps(facts)})
            pq.write_table(table, temporary, compression="zstd")


def candidates(route_R: NDArray[np.int64], nll_R: NDArray[np.float64], space: RouteSpace) -> NDArray[np.int64]:
    """Return, ascending, the ids of the few routes of lowest loss among those with each number of big layers."""
    ranked_R = route_R[np.argsort(nll_R, kind="stable")]
    big_R = space.count_big(ranked_R)
    return np.sort(np.concatenate([ranked_R[big_R == big][:_CANDIDATES] for big in np.unique(big_R)]))
