"""Reads how long forwards took under every policy (evaluate/timing.json; see docs/formats.md)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duollm.errors import UserError
from duollm.files import read_json
from duollm.records.keys import ALL_BIG, ALL_SMALL, BEST_PATTERNS, RANDOM, STATIC, Key

_PATTERN, _ROUTES = "pattern", "routes"


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
        return self.rows.get((_PATTERN if one_for_all else _ROUTES, key.big_layers), {})

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
        facts = read_json(path)
        rows = {(row["policy"], row["big_layers"]): row for row in facts.pop("policies")}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        again = f"delete the folder {path.parent} and run `duollm evaluate` again"
        raise UserError(f"{path}: not a file of times ({error}); {again}") from None
    return Timing(facts, rows)
