"""Scores as `duollm score RUN --out RUN/score` writes them, with planted means."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

DOCUMENTS, TOKENS = 30, 20


def write_scores(run, nll_by_policy, domain="prose", documents=DOCUMENTS, seed=0):
    """Scores whose tokens scatter alike in every run, around the means that are given."""
    random = np.random.default_rng(seed)
    scatter_T = random.gamma(2, 1, documents * TOKENS)
    names = np.repeat([f"{domain}/{number:02d}" for number in range(documents)], TOKENS)
    keys = {
        "document": pa.array(names),
        "window": pa.array(np.zeros(len(names)), pa.int32()),
        "position": pa.array(np.tile(np.arange(1, TOKENS + 1), documents), pa.int32()),
        "token_id": pa.array(random.integers(0, 100, len(names)), pa.int32()),
    }
    tables = [
        pa.table({"policy": [policy] * len(names), **keys, "nll": pa.array(mean + scatter_T, pa.float32())})
        for policy, mean in nll_by_policy.items()
    ]
    (run / "score").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.concat_tables(tables), run / "score" / f"{domain}.parquet")


def write_task(run, share_right_by_policy, documents=DOCUMENTS, items=10, task="continuation", seed=0):
    """Samples of a task whose answers are right at the given shares; documents differ in how hard they are."""
    random = np.random.default_rng(seed)
    hard_D = np.repeat(random.normal(0, 0.1, documents), items)
    drawn_I = random.random(documents * items)
    lines = [
        {
            **{"policy": policy, "doc_hash": f"{document}-{number}", "doc": {"document": f"{document}"}},
            "acc": float(drawn < share + hard),
        }
        for policy, share in share_right_by_policy.items()
        for number, (drawn, hard) in enumerate(zip(drawn_I, hard_D, strict=True))
        for document in [number // items]
    ]
    (run / "score").mkdir(parents=True, exist_ok=True)
    (run / "score" / f"samples_{task}.jsonl").write_text("\n".join(map(json.dumps, lines)))
