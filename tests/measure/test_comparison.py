import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from duollm.config import EvaluateConfig
from duollm.flops import token_flops
from duollm.measure.comparison import candidates, compare_patterns, compare_routers, compared_windows
from duollm.measure.executor import policy_losses
from duollm.models.branch import Branch
from duollm.routers.linear import LinearRouter
from duollm.routers.registry import save_router, trained_routers
from duollm.routes.space import RouteSpace
from tiny import tiny_model
from tiny_corpus import packed_corpus

CONFIG = EvaluateConfig(documents=3, windows_per_document=1)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Two routers of random weights, one of which may skip, evaluated on the oracle's tokens."""
    data = packed_corpus(tmp_path_factory.mktemp("corpus"))
    run, model = tmp_path_factory.mktemp("run"), tiny_model(vocab_size=data.vocab_size)
    routers = {}
    torch.manual_seed(0)
    for name, branches in (("two_k1", (Branch.SMALL, Branch.BIG)), ("three_k2", tuple(Branch))):
        router = LinearRouter(model.config, branches).eval()
        torch.nn.init.normal_(router.weight_LCD)
        facts = {"kind": "linear", "branches": [branch.name.lower() for branch in branches]}
        save_router(router, run / "routers" / name, {**facts, "big_layers": int(name[-1]), "budget": 0.5})
        routers[name] = router
    texts = compared_windows(data, CONFIG, 0)
    compare_routers(model, trained_routers(run, list(routers), ["average", "exact"], model), texts, Branch.SMALL, run)
    return run / "evaluate", model, routers, torch.from_numpy(texts["owls"].token_ids)


def _read(folder, name):
    table = pq.read_table(folder / name / "owls.parquet")
    return table.to_pydict(), json.loads(table.schema.metadata[b"duollm"])


def test_losses_and_routes_are_those_of_the_model_in_use(evaluated):
    folder, model, routers, ids_WT = evaluated
    columns, facts = _read(folder, "three_k2")
    nll_WT, routes_WTL = policy_losses(model, ids_WT, policy=routers["three_k2"])
    assert columns["nll"] == pytest.approx(nll_WT.flatten().tolist())
    space = RouteSpace(3, tuple(Branch))
    assert columns["route"] == space.encode(routes_WTL).flatten().tolist()
    assert facts["branches"] == ["skip", "small", "big"]
    assert facts["branch_costs"][1:] == [0, 1]
    assert facts["branch_costs"][0] < 0


def test_ways_of_spending_have_files_of_their_own(evaluated):
    names = {path.name for path in evaluated[0].iterdir()}
    assert names == {"two_k1", "two_k1_exact", "three_k2", "three_k2_exact", "timing.json"}
    columns, facts = _read(evaluated[0], "two_k1_exact")
    assert (facts["router"], facts["spend"], facts["big_layers"]) == ("two_k1_exact", "exact", 1)
    assert (RouteSpace(3).count_big(torch.tensor(columns["route"])) == 1).all()


@pytest.mark.parametrize("name", ["two_k1", "three_k2"])
def test_flops_are_the_mean_over_the_tokens_and_the_routers_own(evaluated, name):
    folder, model, _, ids_WT = evaluated
    columns, facts = _read(folder, name)
    space = RouteSpace(3, (Branch.SMALL, Branch.BIG) if name == "two_k1" else tuple(Branch))
    routes_NL = space.decode(torch.tensor(columns["route"]))
    ends = (0, ids_WT.shape[1] + 1)  # attention is linear in the context, whose mean is the mean of these
    expected = 2 * 16 * model.config.vocab_size + facts["router_flops_per_token"]
    for branch in Branch:
        share = (routes_NL == branch).double().mean().item()
        expected += share * sum(token_flops(model.config, [int(branch)] * 3, context) for context in ends) / 2
    assert facts["router_flops_per_token"] == 2 * 3 * 16 * (1 if name == "two_k1" else 3)
    assert facts["flops_per_token"] == pytest.approx(expected)


def test_every_policy_is_timed(evaluated):
    timing = json.loads((evaluated[0] / "timing.json").read_text())
    rows = {(row["policy"], row["big_layers"]): row for row in timing["policies"]}
    fixed = {("all-small", 0), *((kind, k) for kind in ("pattern", "routes") for k in (1, 2))}
    routers = {("two_k1", 1), ("two_k1_exact", 1), ("three_k2", 2), ("three_k2_exact", 2)}
    assert set(rows) == fixed | routers
    assert all(row["relative_time"] > 0 for row in rows.values())
    assert {key for key, row in rows.items() if "router_time_share" in row} == routers
    assert timing["all_big_seconds_per_token"] > 0


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
    compare_patterns(model, compared_windows(data, text, seed=0), tmp_path)
    table = pq.read_table(tmp_path / "evaluate" / "owls.routes.parquet").to_pandas()
    windows = data.windows("test", "owls", 3, 2, seed=0)
    for name in set(windows.documents):
        mine = torch.from_numpy(windows.token_ids[np.array(windows.documents) == name])
        for route in range(8):
            nll_WT, _ = policy_losses(model, mine, routes=RouteSpace(3).decode(torch.tensor(route)))
            [row] = table[(table["document"] == name) & (table["route"] == route)].to_dict("records")
            assert row["nll_sum"] == pytest.approx(nll_WT.sum().item(), rel=1e-5)
            assert row["tokens"] == nll_WT.numel()
