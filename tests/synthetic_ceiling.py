"""The predictable ceiling of a synthetic run, with planted gains.

Shape letters: T tokens, R routes.
"""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from synthetic_run import Truth, write_parquet

PREDICTORS = ((0, "l0"), (2, "l2"), (5, "l5"), (5, "shuffled"))
CHOSEN = {2: "l2", 3: "l5"}
"""By budget: the predictor that validation text, which is not there, would have chosen."""
GAIN_PER_LAYER = 0.02


def write_ceiling(run: Path, truths: dict[str, Truth], budgets: tuple[int, ...]) -> None:
    """Write predictors that gain 0.02 nats over the mean route per layer up to their depth, and a control.

    Those that spend on average take one layer more on every other token and one less on the others.
    """
    for domain, truth in truths.items():
        oracle = pq.read_table(run / "oracle" / f"{domain}.parquet")
        columns = {name: oracle.column(name) for name in ("document", "window", "position", "token_id")}
        policies = []
        for k in budgets:
            for spend in ("average", "exact"):
                for depth, predictor in PREDICTORS:
                    named = {"predictor": predictor, "depth": depth, "spend": spend, "big_layers": k}
                    column = f"{spend}_{predictor}_k{k}"
                    policies.append(named | {"column": column, "chosen": CHOSEN[k] == predictor})
                    columns |= _columns(truth, column, k, spend, 0 if predictor == "shuffled" else depth)
        facts = json.loads(oracle.schema.metadata[b"duollm"]) | {"policies": policies}
        write_parquet(run / "ceiling" / f"{domain}.parquet", columns, facts)


def _columns(truth: Truth, column: str, k: int, spend: str, depth: int) -> dict[str, pa.Array]:
    generator = np.random.default_rng(k)
    swing_T = np.resize([1, -1], len(truth.nll_TR)) * (spend == "average")
    route_T = np.array([generator.choice(truth.space.ids_with(big=k + swing)) for swing in swing_T])
    mean_T = truth.nll_TR[:, truth.space.ids_with(big=k)].mean(1)
    nll_T = pa.array(mean_T - GAIN_PER_LAYER * depth, pa.float32())
    return {f"nll_{column}": nll_T, f"route_{column}": pa.array(route_T)}
