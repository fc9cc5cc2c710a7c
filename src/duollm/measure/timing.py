"""How long a forward takes under every policy. Each policy takes turns with all big in the same process.

Shape letters: B sequences, T tokens, L layers.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from duollm.files import write_json
from duollm.flops import mean_token_flops
from duollm.machine import describe_machine, wait_for_gpu
from duollm.models.branch import Branch
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.models.policy import Policy
from duollm.routes.sampling import draw_route_ids, pattern, spread_layers
from duollm.routes.space import RouteSpace

_SEQUENCES, _SECONDS, _ROUNDS = 8, 0.25, 5
"""Time 5 rounds of at most 8 sequences; use fewer sequences if the all-big forward takes longer than 0.25 s."""
_ALL_BIG, _POLICY, _GIVEN = "all big", "policy", "routes given"


@dataclass(frozen=True)
class Workload:
    """A policy to time: a router, or given routes ([L] or [B, T, L]).

    Attributes:
        facts: what the file says of it beside its times.
        model: the model that it routes; by default the timer's.
    """

    facts: Mapping[str, Any]
    policy: Policy | None = None
    routes: Tensor | None = None
    model: DuoForCausalLM | None = None


@dataclass
class Timer:
    """Times of workloads on the same sequences, gathered one by one and then written to a file.

    Args:
        model: the model, in evaluation mode.
        token_ids_BT: token ids; the first few sequences are used, fewer if the model is slow.
        lowest: the branch of the cheapest pattern, all small or all skipped.
    """

    model: DuoForCausalLM
    token_ids_BT: Tensor
    lowest: Branch = Branch.SMALL
    rounds: int = _ROUNDS
    rows: list[dict[str, Any]] = field(default_factory=list)
    all_big: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.load = os.getloadavg()[0]
        self.token_ids_BT = self.token_ids_BT[:_SEQUENCES]
        taken = durations({_ALL_BIG: self._all_big(self.model)})[_ALL_BIG][0]
        self.token_ids_BT = self.token_ids_BT[: max(1, int(_SEQUENCES * min(1.0, _SECONDS / taken)))]

    def measure(self, workload: Workload) -> None:
        """Time one workload: the medians over the rounds of its time relative to all big in the same round.

        A router is also timed against its own choices given as routes, which shows what deciding costs.
        """
        model = workload.model or self.model
        runs = {
            _ALL_BIG: self._all_big(model),
            _POLICY: self._forward(model, policy=workload.policy, routes=workload.routes),
        }
        if workload.policy is not None:
            with torch.inference_mode():
                chosen_BTL = model(input_ids=self.token_ids_BT, policy=workload.policy, use_cache=False).routes
            runs[_GIVEN] = self._forward(model, routes=chosen_BTL)
        spent = durations(runs, rounds=self.rounds)
        ratios = _ratios(spent[_POLICY], spent[_ALL_BIG])
        low, _, high = quantiles(ratios, n=4) if len(ratios) > 1 else 3 * ratios
        self.rows.append({**workload.facts, "relative_time": median(ratios), "relative_time_quartiles": [low, high]})
        if _GIVEN in spent:
            self.rows[-1]["router_time_share"] = 1 - median(_ratios(spent[_GIVEN], spent[_POLICY]))
        self.all_big += spent[_ALL_BIG]

    def write(self, path: Path) -> None:
        """Write what was measured; see docs/formats.md."""
        config, (sequences, length) = self.model.config, self.token_ids_BT.shape
        ends = {"all_small_flops_per_token": self.lowest, "all_big_flops_per_token": Branch.BIG}
        facts = {
            "sequences": sequences,
            "sequence_length": length,
            "rounds": self.rounds,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "load_before": self.load,
            "machine": describe_machine(),
            "all_big_seconds_per_token": median(self.all_big) / self.token_ids_BT.numel(),
        }
        for name, branch in ends.items():
            facts[name] = mean_token_flops(config, [float(branch == each) for each in Branch], length)
        write_json(path, facts | {"policies": self.rows})

    def _all_big(self, model: DuoForCausalLM) -> Callable[[], object]:
        layers = model.config.num_hidden_layers
        return self._forward(model, routes=pattern(range(layers), layers))

    def _forward(self, model: DuoForCausalLM, **given: Any) -> Callable[[], object]:
        @torch.inference_mode()
        def run() -> float:
            logits_BTV = model(input_ids=self.token_ids_BT, use_cache=False, **given).logits
            return float(logits_BTV[-1, -1, 0])  # waits for the device

        return run


def fixed_workloads(
    model: DuoForCausalLM, big_layers: Sequence[int], shape_BT: Sequence[int], lowest: Branch
) -> Iterator[Workload]:
    """Yield all small (or skip) and, for every budget k, one pattern for all tokens and random routes per token.

    The pattern has the cost of static, and the random routes that of executing an oracle's picks.
    """
    space = RouteSpace(model.config.num_hidden_layers, (lowest, Branch.BIG))
    generator = torch.Generator().manual_seed(0)
    yield Workload({"policy": "all-small", "big_layers": 0}, routes=pattern([], space.num_layers, lowest))
    for k in big_layers:
        spread_L = pattern(spread_layers(k, space.num_layers), space.num_layers, lowest)
        yield Workload({"policy": "pattern", "big_layers": k}, routes=spread_L)
        routes_BTL = space.decode(draw_route_ids(space, k, shape_BT, generator)).to(model.device)
        yield Workload({"policy": "routes", "big_layers": k}, routes=routes_BTL)


def durations(
    runs: Mapping[str, Callable[[], object]], seconds: float = 0.0, rounds: int = 1
) -> dict[str, list[float]]:
    """Run the functions in turn, at least `rounds` times, until `seconds` have passed for each on average.

    The first round warms up and is not counted.

    Returns:
        The duration of every run, in seconds.
    """
    for run in runs.values():
        run()
    wait_for_gpu()
    spent: dict[str, list[float]] = {name: [] for name in runs}
    total, done = 0.0, 0
    while done < rounds or total < seconds * len(runs):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            wait_for_gpu()
            spent[name].append(time.perf_counter() - start)
            total += spent[name][-1]
        done += 1
    return spent


def _ratios(times: Sequence[float], references: Sequence[float]) -> list[float]:
    return [own / reference for own, reference in zip(times, references, strict=True)]
