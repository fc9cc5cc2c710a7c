"""What the files of a run say about it beside its records: its domains, its model, and how long forwards took."""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from duollm import files
from duollm.errors import UserError
from duollm.records.files import KINDS
from duollm.records.keys import ALL_BIG, ALL_SMALL, BEST_PATTERNS, RANDOM, STATIC, Key
from duollm.records.tokens import Tokens

_SIZES = ("hidden_size", "intermediate_size", "small_intermediate_size", "num_attention_heads", "vocab_size")


def list_domains(run: Path) -> list[str]:
    """Return the domains that the oracle has searched, in the recipe's order if the run folder has it.

    Raises:
        UserError: there is none.
    """
    found = sorted((run / "oracle").glob("*.parquet"))
    others = tuple(f"{ending}.parquet" for ending in KINDS.values() if ending)
    domains = [file.name.removesuffix(".parquet") for file in found if not file.name.endswith(others)]
    if not domains:
        raise UserError(f"{run / 'oracle'}: no oracle results here; run `duollm oracle` first")
    order = _recipe_order(run / "data" / "manifest.json")
    return sorted(domains, key=lambda domain: (order.get(domain, len(order)), domain))


def _recipe_order(manifest: Path) -> dict[str, int]:
    """Return the place of every domain in the recipe; empty for a run on data kept elsewhere."""
    if not manifest.exists():
        return {}
    try:
        sources = files.read_json(manifest)["sources"]
        return {source["domain"]: place for place, source in enumerate(sources)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{manifest}: not the manifest of packed data ({error}); delete {manifest.parent}") from None


def describe_model(run: Path, oracle: Tokens) -> dict[str, Any]:
    """Return the model's sizes. Sizes that the run folder does not hold (of a model kept elsewhere) are left out.

    A model with LayerNorm and learned positions has `architecture` "opt".
    """
    branches = [branch.name.lower() for branch in oracle.space.branches]
    description: dict[str, Any] = {"num_layers": oracle.space.num_layers, "branches": branches}
    if len(oracle.space.big_layers) <= oracle.space.num_layers:
        description["possible_big_layers"] = oracle.space.big_layers
    config, weights = run / "model" / "config.json", sorted((run / "model").glob("*.safetensors"))
    if config.exists():
        known = read_json(config)
        description |= {key: value for key, value in known.items() if key in _SIZES}
        if (known.get("norm"), known.get("positions")) == ("layer", "learned"):
            description["architecture"] = "opt"
    if training_tokens := _training_tokens(run / "config.yaml"):
        description["training_tokens"] = training_tokens
    if weights:
        description["parameters"] = sum(_count_parameters(file) for file in weights)
    return description


def _training_tokens(recipe: Path) -> int | None:
    """Return for how many tokens the recipe had the model trained; None if it took one or is not there."""
    if not recipe.exists():
        return None
    settings = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    return None if settings["model"]["path"] else int(settings["pretrain"]["tokens"])


def _count_parameters(file: Path) -> int:
    with safe_open(file, "numpy") as tensors:  # reads shapes, not the numbers
        return sum(prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118


@dataclass(frozen=True)
class Timing:
    """Times relative to all big, and the FLOPs of all small and all big."""

    facts: dict[str, Any]
    """How it was measured."""
    rows: dict[tuple[str, int], dict[str, Any]]
    """By policy and number of big layers."""

    def row(self, key: Key) -> dict[str, Any]:
        """Return the timing of a policy. Policies that were not timed borrow the timing of an equivalent workload."""
        if key.policy == ALL_BIG:
            return {"relative_time": 1.0}
        if key.kind or key.policy == ALL_SMALL:
            return self.rows.get((key.policy, key.big_layers), {})
        one_for_all = key.policy in (STATIC, BEST_PATTERNS, RANDOM)
        return self.rows.get(("pattern" if one_for_all else "routes", key.big_layers), {})

    def flops_per_token(self, big_share: float) -> float:
        """Return the mean forward FLOPs of a token whose layers are big for a given share and small otherwise."""
        small, big = self.facts["all_small_flops_per_token"], self.facts["all_big_flops_per_token"]
        return float(small + big_share * (big - small))


def read_timing(run: Path) -> Timing | None:
    """Read evaluate/timing.json; None if no policy was evaluated.

    Raises:
        UserError: the file is damaged.
    """
    path = run / "evaluate" / "timing.json"
    try:
        facts = files.read_json(path)
        rows = {(row["policy"], row["big_layers"]): row for row in facts.pop("policies")}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        again = f"delete the folder {path.parent} and run `duollm evaluate` again"
        raise UserError(f"{path}: not a file of times ({error}); {again}") from None
    return Timing(facts, rows)


def read_json(path: Path) -> Any:
    """Read a JSON file of a run folder.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        return files.read_json(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; is {path.parent} a run folder of duollm?") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); give a run folder of duollm") from None
