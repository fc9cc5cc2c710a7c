"""A synthetic run folder in the documented formats, with planted effects and its own truth.

Every file derives from one table of losses per token and route, which tests keep to compute naive
truths from. Shape letters: T tokens, R routes, L layers, D documents.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from duollm.models.branch import Branch
from duollm.records.files import write_result
from duollm.routes.space import RouteSpace

RANDOM_ROUTES = 100
FLOPS = ("flops_per_token", "router_flops_per_token")


@dataclass(frozen=True)
class Truth:
    """What one domain was made of."""

    space: RouteSpace
    nll_TR: NDArray[np.float64]
    document_T: NDArray[np.int64]
    position_T: NDArray[np.int64]
    router_route_T: dict[int, NDArray[np.int64]]
    good_route_T: dict[tuple[int, str], NDArray[np.int64]]
    """The second kind's routes, by budget and way of spending."""


@dataclass(frozen=True)
class Plan:
    """Sizes and planted effects of a synthetic run."""

    num_layers: int = 6
    documents: int = 12
    tokens_per_document: int = 20
    layer_gain: float = 0.05
    """Nats that each big layer takes off, in the mean."""
    noise: float = 0.3
    """Standard deviation of the loss over routes: what an oracle can exploit."""
    router_budgets: tuple[int, ...] = (1, 2, 3, 4, 5)
    counted_share: float = 1.0
    """Share of each document's tokens on which fixed patterns are run."""
    overspent_share: float = 0.0
    """Share of the tokens on which a router takes one big layer more than it was asked to."""
    measures: bool = True
    """Whether what newer files hold is there: executed picks, drawn labels, further contexts and budgets."""
    more_routers: bool = False
    """Whether there is a second kind of router that takes the oracle's route on half of the tokens, and times."""
    seed: int = 7
    branches: tuple[Branch, Branch] = (Branch.SMALL, Branch.BIG)


def write_run(run: Path, plan: Plan = Plan(), words: dict[str, list[str]] | None = None) -> dict[str, Truth]:
    """Write a run folder and return each domain's truth. `words` gives the tokens' texts by domain."""
    words = words or {
        "prose": ["The", " state", " of", "\n", " the", " <union>", " & "],
        "code": ["def", " f", "(", "\t"],
    }
    _write_json(run / "provenance.json", {"version": "0.1.0", "seed": plan.seed, "command": "duollm study"})
    _write_json(run / "model" / "config.json", {"hidden_size": 8, "num_hidden_layers": plan.num_layers})
    if plan.more_routers:
        write_timing(run, plan)
    return {
        domain: _write_domain(run, domain, plan, texts, np.random.default_rng([plan.seed, index]))
        for index, (domain, texts) in enumerate(words.items())
    }


def _write_domain(run: Path, domain: str, plan: Plan, words: list[str], generator: np.random.Generator) -> Truth:
    space = RouteSpace(plan.num_layers, plan.branches)
    tokens = plan.documents * plan.tokens_per_document
    document_T = np.repeat(np.arange(plan.documents), plan.tokens_per_document)
    position_T = np.tile(np.arange(1, plan.tokens_per_document + 1), plan.documents)
    nll_TR = _losses(space, plan, document_T, generator)
    routers = {k: _router_routes(space, plan, k, tokens, generator) for k in plan.router_budgets}
    good = _good_routes(space, plan, nll_TR) if plan.more_routers else {}
    truth = Truth(space, nll_TR, document_T, position_T, routers, good)
    texts = [words[i % len(words)] for i in range(tokens)]
    keys = {
        "document": pa.array([f"{domain}/{d:02d}.txt" for d in document_T]),
        "window": pa.array(np.zeros(tokens), pa.int32()),
        "position": pa.array(position_T, pa.int32()),
        "token_id": pa.array(generator.integers(0, 300, tokens), pa.int32()),
    }
    facts: dict[str, Any] = {
        "num_layers": plan.num_layers,
        "branches": [branch.name.lower() for branch in plan.branches],
        "context": "shared",
        "big_layers": list(range(plan.num_layers + 1)),
        "sequence_length": plan.tokens_per_document + 1,
        "random_routes": RANDOM_ROUTES,
        "search": "exact",
        "counted_share": plan.counted_share,
        "version": "0.1.0",
    }
    counted_T = np.ones(tokens, dtype=bool)
    if plan.counted_share < 1:
        counted_T = _sample(document_T, plan.counted_share, generator)
    oracle = _oracle_columns(truth, plan, generator)
    before = {}
    if plan.measures:
        before["before"] = pa.array(["\n" if position == 1 else "" for position in position_T])
        oracle |= _further_columns(truth, plan, np.random.default_rng(plan.seed))
        picked_T5 = np.random.default_rng(plan.seed).integers(len(texts), size=(tokens, 5))
        oracle["rank"] = pa.array(np.arange(tokens, dtype=np.int32) % 9 + 1)
        oracle["top5_text"] = pa.array([[texts[place] for place in row] for row in picked_T5])
        oracle["top5_probability"] = pa.array([[0.5, 0.25, 0.125, 0.0625, 0.01]] * tokens)
    write_parquet(run / "oracle" / f"{domain}.parquet", {**keys, "text": pa.array(texts), **before, **oracle}, facts)
    write_parquet(run / "oracle" / f"{domain}.routes.parquet", _route_columns(truth, domain, counted_T), facts)
    for k, route_T in routers.items():
        columns = {**keys, "nll": _float32(nll_TR[np.arange(tokens), route_T]), "route": pa.array(route_T)}
        write_router(run, domain, columns, {**facts, "kind": "linear", "router": f"linear-k{k}", "big_layers": k})
    for (k, spend), route_T in good.items():
        columns = {**keys, "nll": _float32(nll_TR[np.arange(tokens), route_T]), "route": pa.array(route_T)}
        name = f"gains_k{k}_exact" if spend == "exact" else f"gains_k{k}"
        cost = {"flops_per_token": 1010.0 + 100 * k, "router_flops_per_token": 10.0, "branch_costs": [-0.2, 0.0, 1.0]}
        router = {"kind": "gains", "router": name, "big_layers": k, "spend": spend, **cost}
        write_router(run, domain, columns, {**facts, **router})
    return truth


def write_router(run: Path, domain: str, columns: dict[str, pa.Array], facts: dict[str, Any]) -> None:
    """Write what a router did on one domain."""
    path, share = run / "evaluate" / facts["router"] / f"{domain}.parquet", facts["big_layers"] / facts["num_layers"]
    usual = {
        "spend": "average",
        "branch_costs": [0.0, 0.0, 1.0],
        "flops_per_token": None,
        "router_flops_per_token": None,
    }
    write_parquet(path, columns, usual | facts | {"budget": share, "calibrated_share": share})


def _good_routes(space: RouteSpace, plan: Plan, nll_TR: NDArray[np.float64]) -> dict[tuple[int, str], Any]:
    """The best route of the budget on every other token, else a random one; on average: k - 1 and k + 1 big in turn."""
    generator, good = np.random.default_rng(plan.seed), {}
    even_T = np.arange(len(nll_TR)) % 2 == 0
    for k in plan.router_budgets:
        ids = space.ids_with(big=k)
        best_T = ids[nll_TR[:, ids].argmin(1)]
        good[k, "exact"] = np.where(even_T, best_T, generator.choice(ids, len(nll_TR)))
        uneven = [generator.choice(space.ids_with(big=k + step), len(nll_TR)) for step in (-1, 1)]
        good[k, "average"] = np.where(even_T, best_T, np.where(np.arange(len(nll_TR)) % 4 == 1, *uneven))
    return good


def write_timing(run: Path, plan: Plan) -> None:
    """All small takes 0.6 of all big, patterns are on the line between, routes take 5 % and routers 10 % more."""
    rows: list[dict[str, Any]] = [{"policy": "all-small", "big_layers": 0, "relative_time": 0.6}]
    for k in plan.router_budgets:
        line = 0.6 + 0.4 * k / plan.num_layers
        rows.append({"policy": "pattern", "big_layers": k, "relative_time": line})
        rows.append({"policy": "routes", "big_layers": k, "relative_time": 1.05 * line})
        for name in (f"linear-k{k}", f"gains_k{k}", f"gains_k{k}_exact"):
            times = {"relative_time": 1.1 * line, "router_time_share": 1 - 1.05 / 1.1}
            rows.append({"policy": name, "big_layers": k, **times})
    for row in rows:
        row["relative_time_quartiles"] = [0.99 * row["relative_time"], 1.01 * row["relative_time"]]
    facts = {"all_small_flops_per_token": 1000.0, "all_big_flops_per_token": 1000.0 + 100 * plan.num_layers}
    facts |= {"all_big_seconds_per_token": 2e-4, "sequences": 8, "sequence_length": 21, "rounds": 7, "dtype": "float32"}
    facts |= {"threads": 2, "load_before": 0.1, "machine": {"cpu": "an imagined one", "cores": 2}}
    _write_json(run / "evaluate" / "timing.json", {**facts, "policies": rows})


def _losses(
    space: RouteSpace, plan: Plan, document_T: NDArray[np.int64], generator: np.random.Generator
) -> NDArray[np.float64]:
    """Base loss per document and token, minus a gain per big layer (more in late layers), plus noise per route."""
    tokens = len(document_T)
    is_big_RL = space.decode(np.arange(space.size)) == Branch.BIG
    gain_L = plan.layer_gain * np.linspace(0.5, 1.5, plan.num_layers)
    base_T = 3 + 0.3 * generator.standard_normal(plan.documents)[document_T] + generator.gamma(2, 0.5, tokens)
    sensitivity_T = generator.gamma(1.0, 1.0, tokens)
    noise_TL = plan.noise * sensitivity_T[:, None] * generator.standard_normal((tokens, plan.num_layers))
    noise_TR = noise_TL @ (is_big_RL - 0.5).T
    # Stored as float32, so the truth holds the very same numbers.
    return (base_T[:, None] - is_big_RL @ gain_L + noise_TR).astype(np.float32).astype(np.float64)


def _router_routes(
    space: RouteSpace, plan: Plan, k: int, tokens: int, generator: np.random.Generator
) -> NDArray[np.int64]:
    """A router that makes random picks among the routes of its budget."""
    route_T = generator.choice(space.ids_with(big=k), tokens)
    over_T = np.arange(tokens) % 20 < 20 * plan.overspent_share
    return np.where(over_T, generator.choice(space.ids_with(big=k + 1), tokens), route_T)


def _oracle_columns(truth: Truth, plan: Plan, generator: np.random.Generator) -> dict[str, pa.Array]:
    columns = {"nll_small": _float32(truth.nll_TR[:, 0]), "nll_big": _float32(truth.nll_TR[:, -1])}
    for k in range(plan.num_layers + 1):
        ids = truth.space.ids_with(big=k)
        allowed_TR = truth.nll_TR[:, ids]
        columns[f"nll_shared_k{k}"] = _float32(allowed_TR.min(1))
        columns[f"route_shared_k{k}"] = pa.array(ids[allowed_TR.argmin(1)])
        drawn_TN = generator.integers(0, len(ids), (len(allowed_TR), RANDOM_ROUTES))
        columns[f"nll_random{RANDOM_ROUTES}_k{k}"] = _float32(np.take_along_axis(allowed_TR, drawn_TN, 1).min(1))
    return columns


def _further_columns(truth: Truth, plan: Plan, generator: np.random.Generator) -> dict[str, pa.Array]:
    """Picks that lose 0.1 nats when executed together; drawn labels that gain 0.4 with a peek and lose 0.1 without.

    The routes that are best for drawn labels are random.
    """
    columns, drawn = {}, np.random.default_rng(plan.seed)
    for k in range(plan.num_layers + 1):
        best_T = truth.nll_TR[:, truth.space.ids_with(big=k)].min(1)
        noise_QT = 0.2 * generator.standard_normal((4, len(best_T)))
        expected_T = truth.nll_TR.mean(1) + noise_QT[0]
        columns[f"executed_shared_k{k}"] = _float32(best_T + 0.1 + noise_QT[1])
        columns[f"expected_static_k{k}"] = _float32(expected_T)
        columns[f"resampled_route_shared_k{k}"] = pa.array(drawn.choice(truth.space.ids_with(big=k), len(best_T)))
        columns[f"resampled_nll_shared_k{k}"] = _float32(expected_T - 0.4 + noise_QT[2])
        columns[f"resampled_score_shared_k{k}"] = _float32(expected_T + 0.1 + noise_QT[3])
    return columns | _committed_columns(truth, plan) | _ramp_columns(truth, plan)


def _committed_columns(truth: Truth, plan: Plan) -> dict[str, pa.Array]:
    """A committed search at a third of the layers only, 0.2 nats above the shared one."""
    k = round(plan.num_layers / 3)
    ids = truth.space.ids_with(big=k)
    nll_T = _float32(truth.nll_TR[:, ids].min(1) + 0.2)
    route_T = pa.array(ids[truth.nll_TR[:, ids].argmin(1)])
    names = (f"nll_committed_k{k}", f"executed_committed_k{k}", f"route_committed_k{k}")
    return dict(zip(names, (nll_T, nll_T, route_T), strict=True))


def _ramp_columns(truth: Truth, plan: Plan) -> dict[str, pa.Array]:
    """Budgets that slide over the positions, both ways about a third of the layers."""
    columns = {}
    low, high = round(plan.num_layers / 6), round(plan.num_layers / 2)
    big_R = truth.space.count_big(np.arange(truth.space.size))
    for first, last in ((low, high), (high, low)):
        big_T = np.round(first + (last - first) * (truth.position_T - 1) / (plan.tokens_per_document - 1))
        allowed_TR = np.where(big_R == big_T[:, None], truth.nll_TR, np.inf)
        columns[f"nll_shared_ramp{first}to{last}"] = _float32(allowed_TR.min(1))
        columns[f"route_shared_ramp{first}to{last}"] = pa.array(allowed_TR.argmin(1))
    return columns


def _sample(document_T: NDArray[np.int64], share: float, generator: np.random.Generator) -> NDArray[np.bool_]:
    """Choose the same number of tokens from every document at random."""
    chosen_T = np.zeros(len(document_T), dtype=bool)
    for document in np.unique(document_T):
        mine = np.flatnonzero(document_T == document)
        chosen_T[generator.choice(mine, round(share * len(mine)), replace=False)] = True
    return chosen_T


def _route_columns(truth: Truth, domain: str, counted_T: NDArray[np.bool_]) -> dict[str, pa.Array]:
    documents, routes = int(truth.document_T.max()) + 1, truth.space.size
    sums_DR = np.stack([truth.nll_TR[counted_T & (truth.document_T == d)].sum(0) for d in range(documents)])
    return {
        "document": pa.array([f"{domain}/{d:02d}.txt" for d in np.repeat(np.arange(documents), routes)]),
        "route": pa.array(np.tile(np.arange(routes), documents)),
        "nll_sum": pa.array(sums_DR.ravel()),
        "tokens": pa.array(np.repeat(np.bincount(truth.document_T[counted_T]), routes), pa.int32()),
    }


def write_parquet(path: Path, columns: dict[str, pa.Array], facts: dict[str, Any] | None) -> None:
    """Write columns, with `facts` as duollm's metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if facts:
        write_result(path, columns, facts)
    else:
        pq.write_table(pa.table(columns), path)


def _float32(values: NDArray[np.float64]) -> pa.Array:
    return pa.array(values, pa.float32())


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
