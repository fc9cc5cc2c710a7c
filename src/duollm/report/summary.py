"""What a finished study says on the terminal: how long its stages took, and the few numbers that matter."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from duollm.analysis.results import Results, read_results
from duollm.files import read_json
from duollm.records.bootstrap import Estimate, nats, tenths, with_interval
from duollm.records.keys import AVERAGE, CEILING, EXACT, EXECUTED, ORACLE, RANDOM, STATIC
from duollm.report.gain_figures import of_first_context
from duollm.terminal import Cell, print_table, sparkline

_WORDS = {
    RANDOM: "random patterns, mean",
    STATIC: "fixed pattern",
    CEILING: "best predictor found",
    EXECUTED: "hindsight, executed together",
    ORACLE: "hindsight (oracle)",
}
"""The policies of the frontier, named as on the page (page/colour.js)."""
_MOST_BARS = 40


def print_summary(run: Path, stages: Sequence[str]) -> None:
    """Print the times of the stages, what was gained over static at one budget, and where to look next."""
    results = read_results(run)
    times: list[dict[str, Cell]] = [{"stage": name, "seconds": seconds} for name, seconds in _seconds(run, stages)]
    print_table(f"{run}: time", [*times, {"stage": "all", "seconds": sum(float(row["seconds"] or 0) for row in times)}])
    budget = results.shown_budget(results.selection_noise or results.comparison)
    gains: list[dict[str, Cell]] = [
        {
            "what": name,
            "gains over the fixed pattern [95 %]": with_interval(gain),
            "of the oracle's gain": with_interval(share, tenths) if share else "",
        }
        for name, gain, share in gains_at(results, budget)
    ]
    if gains:
        domains = "all domains" if results.headline == "pooled" else results.headline
        print_table(f"nats per token with {budget} of {results.num_layers} layers big, {domains}", gains)
    print_frontier(results)
    print(f"Next: duollm report {run} --open\n      duollm compare {run}", flush=True)


def print_frontier(results: Results) -> None:
    """Print a line per policy: its loss over budgets as bars of one scale, at one budget, and where it is lowest."""
    layers, domain = results.num_layers, results.headline
    budget = results.shown_budget(results.selection_noise or results.comparison)
    losses: dict[str, dict[int, float]] = {}
    for row in results.main_nll:
        if row.domain == domain and (row.policy in _WORDS or row.kind) and row.spend != EXACT:
            losses.setdefault(row.variant, {})[row.big_layers] = row.nll.value
    every = [loss for of_policy in losses.values() for loss in of_policy.values()]
    rows: list[dict[str, Cell]] = []
    for name, of_budget in losses.items():
        bars = sparkline([of_budget.get(k) for k in range(layers + 1)], min(every), max(every))
        best = min(of_budget, key=lambda k: of_budget[k])
        at = nats(of_budget.get(budget))
        lowest = f"{nats(of_budget[best])} at {best}"
        rows.append(
            {
                "policy": _WORDS.get(name, f"router ({name})"),
                f"0 .. {layers} big layers": bars,
                f"at {budget}": at,
                "lowest": lowest,
            }
        )
    print_table(f"nats per token, {'all domains' if domain == 'pooled' else domain}", rows)


def print_routers(run: Path, names: Sequence[str], training: str) -> None:
    """Print what routers of one training spend on validation text, and their loss while they were trained."""
    metrics = run / "metrics.jsonl"  # not there if nothing was trained by steps
    steps = map(json.loads, metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else ())
    losses = [step["nll"] for step in steps if step.get("training") == training and "nll" in step]
    rows: list[dict[str, Cell]] = []
    for name in names:
        facts = read_json(run / "routers" / name / "router.json")
        rows.append({"router": name, "share asked": facts["budget"], "share spent": facts["calibrated_share"]})
    print_table(f"{training}: big layers on validation text", rows)
    if losses:
        thinned = losses[:: -(-len(losses) // _MOST_BARS)]
        print(f"training loss {sparkline(thinned, min(thinned), max(thinned))} {nats(losses[0])} .. {nats(losses[-1])}")


def gains_at(results: Results, budget: int) -> Iterator[tuple[str, Estimate, Estimate | None]]:
    """Yield, in the words of the page's overview, what is gained over static at a budget, and a router's share of it.

    The share is of the oracle's gain; it is None for all others.
    """
    here = results.headline, budget
    for noise in of_first_context(results.selection_noise):
        if (noise.domain, noise.big_layers) == here:
            yield "choosing in hindsight (oracle)", noise.gain, None
            yield "the same search on made-up labels", noise.gain_drawn, None
            yield "those picks on a second made-up label", noise.second_draw, None
    for ceiling in results.ceiling:
        if (ceiling.domain, ceiling.big_layers) == here and ceiling.spend == AVERAGE:
            if ceiling.chosen:
                yield _WORDS[CEILING], ceiling.gain, None
            elif ceiling.shuffled:
                yield "its control, fitted to other tokens", ceiling.gain, None
    for row in results.comparison:
        if row.kind and (row.domain, row.big_layers) == here and row.spend != EXACT and row.fair_gain:
            yield f"router ({row.variant})", row.fair_gain, row.of_oracle


def _seconds(run: Path, stages: Sequence[str]) -> Iterator[tuple[str, float]]:
    for name in stages:
        marker = json.loads((run / "stages" / f"{name}.json").read_text(encoding="utf-8"))
        if marker["seconds"] >= 0.1:
            yield name, marker["seconds"]
