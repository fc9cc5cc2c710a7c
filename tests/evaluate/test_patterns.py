import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from duollm.config import EvaluateConfig
from duollm.evaluate.losses import policy_losses
from duollm.evaluate.patterns import candidates, evaluate_patterns
from duollm.routes.space import RouteSpace
from tiny import tiny_model
from tiny_corpus import packed_corpus

SPACE = RouteSpace(3)


def test_candidates_are_the_best_of_every_number_of_big_layers():
    generator = np.random.default_rng(0)
    route_R, nll_R = generator.permutation(8), generator.random(8)
    chosen = candidates(route_R, nll_R, RouteSpace(3)).tolist()
    assert chosen == list(range(8)), "of three layers there are at most three patterns of a number"
    space = RouteSpace(5)
    route_R, nll_R = np.arange(32), generator.random(32)
    big_R = space.count_big(route_R)
    expected = [route for k in range(6) for route in sorted(route_R[big_R == k], key=lambda r: nll_R[r])[:3]]
    assert candidates(route_R, nll_R, space).tolist() == sorted(expected)


def test_sums_are_those_of_the_model_on_each_document(tmp_path):
    data = packed_corpus(tmp_path / "corpus")
    model, text = tiny_model(vocab_size=data.vocab_size), EvaluateConfig(documents=3, windows_per_document=2)
    facts = {"duollm": json.dumps({"num_layers": 3, "branches": ["small", "big"]})}
    of_oracle = pa.table({"document": ["a"] * 8, "route": np.arange(8), "nll_sum": np.arange(8.0), "tokens": [1] * 8})
    (tmp_path / "oracle").mkdir()
    pq.write_table(of_oracle.replace_schema_metadata(facts), tmp_path / "oracle" / "owls.routes.parquet")
    evaluate_patterns(model, data, text, seed=0, run=tmp_path)
    table = pq.read_table(tmp_path / "evaluate" / "owls.routes.parquet").to_pandas()
    windows = data.windows("test", "owls", 3, 2, seed=0)
    for name in set(windows.documents):
        mine = torch.from_numpy(windows.token_ids[np.array(windows.documents) == name])
        for route in range(8):
            nll_WT, _ = policy_losses(model, mine, routes=SPACE.decode(torch.tensor(route)))
            [row] = table[(table["document"] == name) & (table["route"] == route)].to_dict("records")
            assert row["nll_sum"] == pytest.approx(nll_WT.sum().item(), rel=1e-5)
            assert row["tokens"] == nll_WT.numel()
