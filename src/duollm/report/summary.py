"""What a finished study says on the terminal: how long its stages took, and the few numbers that matter."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from duollm.analysis.results import Results, read_results
from duollm.records.bootstrap import Estimate
from duollm.records.keys import AVERAGE, EXACT
from duollm.records.numbers import with_interval
from duollm.report.gain_figures import of_first_context
from duollm.terminal import Cell, print_table


def print_summary(run: Path, stages: Sequence[str]) -> None:
    """Print the times of the stages, what was gained over static at one budget, and where to look next."""
    results = read_results(run)
    times: list[dict[str, Cell]] = [{"stage": name, "seconds": seconds} for name, seconds in _seconds(run, stages)]
    print_table(f"{run}: time", [*times, {"stage": "all", "seconds": sum(float(row["seconds"] or 0) for row in times)}])
    budget = summary_budget(results)
    gains: list[dict[str, Cell]] = [
        {"policy": name, "gain over static [95 %]": with_interval(gain)} for name, gain in gains_at(results, budget)
    ]
    if gains:
        domains = "all domains" if results.headline == "pooled" else results.headline
        print_table(f"nats per token at {budget} big layers of {results.num_layers}, {domains}", gains)
    print(f"Next: duollm report {run} --open\n      duollm compare {run}", flush=True)


def summary_budget(results: Results) -> int:
    """Return the budget nearest to a third of the layers at which something was compared with static."""
    wanted = results.focus_budgets[0]
    measured = {row.big_layers for row in results.selection_noise} or {row.big_layers for row in results.comparison}
    return min(sorted(measured), key=lambda k: abs(k - wanted), default=wanted)


def gains_at(results: Results, budget: int) -> Iterator[tuple[str, Estimate]]:
    """Yield what the oracle, drawn labels, the ceiling and every router gain over static at a budget."""
    here = results.headline, budget
    for noise in of_first_context(results.selection_noise):
        if (noise.domain, noise.big_layers) == here:
            yield "oracle", noise.gain
            yield "oracle of labels drawn from the model", noise.gain_drawn
            yield "the same picks on a second draw", noise.second_draw
    for ceiling in results.ceiling:
        if (ceiling.domain, ceiling.big_layers) == here and ceiling.spend == AVERAGE:
            if ceiling.chosen:
                yield "predictable ceiling", ceiling.gain
            elif ceiling.shuffled:
                yield "its control, fitted to other tokens", ceiling.gain
    for row in results.comparison:
        if row.kind and (row.domain, row.big_layers) == here and row.spend != EXACT and row.fair_gain:
            yield f"router {row.kind}", row.fair_gain


def _seconds(run: Path, stages: Sequence[str]) -> Iterator[tuple[str, float]]:
    for name in stages:
        marker = json.loads((run / "stages" / f"{name}.json").read_text(encoding="utf-8"))
        if marker["seconds"] >= 0.1:
            yield name, marker["seconds"]
