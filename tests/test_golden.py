"""The numbers of two studies, pinned: they stay when the code that computes them moves.

`python tests/test_golden.py` writes the golden files again; do that only when a number is meant to change, and say
in the commit which and why. Keys may be regrouped: `as_in_golden` says how today's results read in the golden files.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from duollm.analysis.analyse import analyse
from duollm.config import Recipe
from duollm.records.facts import read_json
from duollm.study import run_study
from synthetic_run import Plan, write_run
from tiny import SIZES
from tiny_corpus import write_corpus

GOLDEN = Path(__file__).parent / "golden"
MEASURED = ("provenance", "timing")
"""Parts of results.json that differ from machine to machine; so do values whose keys speak of times."""


def synthetic_results(folder: Path) -> dict[str, Any]:
    """A run of known truth with several kinds of routers."""
    write_run(folder / "run", Plan(more_routers=True, documents=8))
    analyse(folder / "run", bootstrap_samples=100)
    return read_json(folder / "run" / "results.json")


def study_results(folder: Path) -> dict[str, Any]:
    """A real study of a tiny model: every context, noise, ceiling, labels, and routers of every way of training."""
    corpora = [str(write_corpus(folder / name, documents=30, seed=seed)) for seed, name in enumerate(["owls", "cats"])]
    sizes = {"hidden_size", "num_hidden_layers", "intermediate_size", "small_intermediate_size"}
    recipe = {
        "name": "golden",
        "model": {key: SIZES[key] for key in sizes},
        "data": {"domains": corpora, "vocab_size": 300, "sequence_length": 16, "test_share": 0.3},
        "pretrain": {"tokens": 4000, "batch_size": 8, "precision": "fp32"},
        "oracle": {
            "documents": 6,
            "random_routes": 3,
            "contexts": ["shared", "reference", "committed"],
            "committed_big_layers": [1, 2],
            "more_budgets": ["at-most 1", "flops 0.5", "ramp 2 1"],
        },
        "router": {
            "kinds": ["linear", "gains", "sequential", "distilled", "codebook", "random", "early-exit"],
            "big_layers": [1, 2],
            "tokens": 1000,
            "label_tokens": 200,
            "batch_size": 8,
            "precision": "fp32",
        },
        "ceiling": {"tokens": 500, "width": 4, "precision": "fp32"},
        "report": {"bootstrap_samples": 100, "shown_documents": 1},
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run_study(Recipe.model_validate(recipe), folder / "run", ["duollm", "study"])
    finally:
        torch.set_num_threads(threads)
    return read_json(folder / "run" / "results.json")


def machine() -> str:
    """What decides how a float32 product is rounded."""
    vendor = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("vendor_id")), "")
    return f"{vendor.partition(':')[2].strip()} {torch.backends.cpu.get_cpu_capability()} torch {torch.__version__}"


def without_measurements(results: Any) -> Any:
    """Leave out what depends on the machine."""
    if isinstance(results, dict):
        kept = {
            key: value for key, value in results.items() if key not in MEASURED and not re.search("time|second", key)
        }
        return {key: without_measurements(value) for key, value in kept.items()}
    if isinstance(results, list):
        return [without_measurements(value) for value in results]
    return results


LEADING = {
    **{"nll": "nll", "gap_closed": "closed", "comparison": "nll", "ceiling": "gain", "difficulty": "hard_without_gain"},
    **{"agreement": "share_by_layer", "best_of_patterns": "nll", "layer_use": "share_by_layer"},
    **{"claims": "estimate", "conditions": "estimate"},
}
"""By list: the estimate whose ends the golden files call only `low` and `high`; those of others begin with its name."""
GONE = re.compile("(share|low|high)_by_position$")
"""What no reader of results.json ever used."""
ONCE_ABSENT = {
    "best_of_routes",
    "compared_documents",
    "compared_tokens",
    "families",
    "difficulty_by_class",
    "helped_most",
    "units",
    "tries",
    "of_oracle",
}
"""What was added, or left out where it is now null."""


def as_in_golden(results: dict[str, Any]) -> dict[str, Any]:
    """Return results in the form of the golden files, in which an estimate is three keys beside each other."""
    flat = {
        name: [flattened(row, LEADING.get(name)) for row in value] if isinstance(value, list) else value
        for name, value in results.items()
        if name not in ONCE_ABSENT
    }
    drop_loss_of_other_contexts(flat)
    flat["claims"] = [as_once_claimed(claim) for claim in flat["claims"] if int(claim["id"][1:]) <= 8]
    sizes = {domain: without_null(size, ONCE_ABSENT) for domain, size in results["data"].items()}
    return flat | {"data": sizes}


def as_once_claimed(claim: dict[str, Any]) -> dict[str, Any]:
    """Return a claim without what was added, and without its words; what was not measured used to be undecided."""
    kept = {name: value for name, value in claim.items() if name not in WORDS}
    kept["verdict"] = claim["verdict"].replace("not measured", "undecided")
    if "conditions" in claim:
        kept["conditions"] = [as_once_claimed(condition) for condition in claim["conditions"]]
    return kept


def flattened(row: dict[str, Any], leading: str | None) -> dict[str, Any]:
    """Turn every estimate of a row, and every list of estimates, into a key for the value and one for each end."""
    flat = {}
    for name, value in row.items():
        ends = {end: end if name == leading else f"{name}_{end}" for end in ("low", "high")}
        if name in ONCE_ABSENT:
            continue
        if name == "conditions":
            flat[name] = [flattened(condition, LEADING[name]) for condition in value]
        elif is_estimate(value):
            flat |= {name: value["value"]} | {ends[end]: value[end] for end in ends}
        elif isinstance(value, list) and value and is_estimate(value[0]):
            flat |= {name: [each["value"] for each in value]}
            flat |= {ends[end]: [each[end] for each in value] for end in ends}
        elif name == "share_by_layer_and_position":  # it had no intervals
            flat[name] = [[each["value"] for each in line] for line in value]
        elif value is None and name in MAY_LACK:
            flat |= {name: None, ends["low"]: None, ends["high"]: None}
        else:
            flat[name] = value
    return flat


def one_row_each(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Keep the last row of a policy: depths of the ceiling that tied on validation text used to have one each."""
    return list({(*(row[key] for key in ("domain", "policy", "big_layers", "context")),): row for row in rows}.values())


def drop_loss_of_other_contexts(results: dict[str, Any]) -> None:
    """Leave out `compared_nll` of oracles in other contexts.

    A run whose routers were on the oracle's text only used to have it for single domains and not for all pooled.
    """
    for row in results["comparison"]:
        if row["context"] not in (None, results["context"]):
            row.pop("compared_nll", None)


WORDS = {"finding", "quantity", "statement", "source", "readings", "above", "below"}
"""Of a claim and its conditions."""
MAY_LACK = {"closed", "closed_at_spent", "gain_over_static", "gain_at_spent", "of_ceiling", "estimate"}
"""Estimates that are null where nothing was measured."""


def is_estimate(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == {"value", "low", "high"}


def without_null(values: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None or name not in names}


def differences(golden: Any, found: Any, tolerance: float, where: str = "") -> list[str]:
    """Where two results differ."""
    if isinstance(golden, dict) and isinstance(found, dict):
        wrong = [f"{where}/{key}: only in one" for key in golden.keys() ^ found.keys()]
        return wrong + [
            each
            for key in golden.keys() & found.keys()
            for each in differences(golden[key], found[key], tolerance, f"{where}/{key}")
        ]
    if isinstance(golden, list) and isinstance(found, list):
        if len(golden) != len(found):
            return [f"{where}: {len(golden)} entries, now {len(found)}"]
        pairs = enumerate(zip(golden, found, strict=True))
        return [each for number, pair in pairs for each in differences(*pair, tolerance, f"{where}/{number}")]
    if isinstance(golden, float) and isinstance(found, float | int):
        same = abs(golden - found) <= tolerance * max(1.0, abs(golden))
        return [] if same else [f"{where}: {golden}, now {found}"]
    return [] if golden == found else [f"{where}: {golden!r}, now {found!r}"]


def read_golden(name: str) -> dict[str, Any]:
    golden: dict[str, Any] = read_json(GOLDEN / f"{name}.json")
    results = golden.get("results") or golden
    for row in results["layer_use"]:
        for key in [key for key in row if GONE.search(key)]:
            del row[key]
    for name in ("nll", "comparison"):
        results[name] = one_row_each(results[name])
    drop_loss_of_other_contexts(results)
    results["claims"] = [as_once_claimed(claim) for claim in results["claims"]]
    return golden


def test_the_synthetic_run(tmp_path):
    found = without_measurements(as_in_golden(synthetic_results(tmp_path)))
    assert differences(read_golden("synthetic"), found, tolerance=1e-9) == []


@pytest.mark.filterwarnings("ignore:Glyph:UserWarning")
def test_a_tiny_study(tmp_path, monkeypatch):
    golden = read_golden("study")
    if golden["machine"] != machine():
        pytest.skip(f"float32 rounds differently on {machine()} than on {golden['machine']}")
    monkeypatch.setattr("duollm.training.loop.matmul_peak", lambda precision: 1e9)
    found = without_measurements(as_in_golden(study_results(tmp_path)))
    assert differences(golden["results"], found, tolerance=1e-6) == []


if __name__ == "__main__":
    import tempfile

    GOLDEN.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        study = {"machine": machine(), "results": without_measurements(as_in_golden(study_results(Path(two))))}
        made = {"synthetic": without_measurements(as_in_golden(synthetic_results(Path(one)))), "study": study}
    for name, content in made.items():
        (GOLDEN / f"{name}.json").write_text(json.dumps(content, indent=0) + "\n", encoding="utf-8")
        print(f"wrote {GOLDEN / name}.json", file=sys.stderr)
