"""What forwards took, as the evaluation measured it (evaluate/timing.json; see docs/formats.md)."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duollm.analysis.policies import ALL_BIG, ALL_SMALL, BEST_PATTERNS, RANDOM, STATIC, Score
from duollm.errors import UserError

_PATTERN, _ROUTES = "pattern", "routes"


@dataclass(frozen=True)
class Timing:
    """Times relative to all big, and the FLOPs of both ends."""

    facts: dict[str, Any]
    """How it was measured."""
    rows: dict[tuple[str, int], dict[str, Any]]
    """By policy and number of big layers."""

    def row(self, score: Score) -> dict[str, Any]:
        """Return what was measured of a policy, or of what takes as long: one pattern for all, or routes per token."""
        if score.policy == ALL_BIG:
            return {"relative_time": 1.0}
        if score.kind or score.policy == ALL_SMALL:
            return self.rows.get((score.policy, score.big_layers), {})
        fixed = score.policy in (STATIC, BEST_PATTERNS, RANDOM)
        return self.rows.get((_PATTERN if fixed else _ROUTES, score.big_layers), {})

    def flops_per_token(self, big_share: float) -> float:
        """Return the mean forward FLOPs of a token when a share of its layers is big and the others are small."""
        small, big = self.facts["all_small_flops_per_token"], self.facts["all_big_flops_per_token"]
        return float(small + big_share * (big - small))


def read_timing(run: Path) -> Timing | None:
    """Read evaluate/timing.json; None if the run has none, as older ones.

    Raises:
        UserError: it is damaged.
    """
    path = run / "evaluate" / "timing.json"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        rows = {(row["policy"], row["big_layers"]): row for row in facts.pop("policies")}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        again = f"delete the folder {path.parent} and run `duollm evaluate` again"
        raise UserError(f"{path}: not a file of times ({error}); {again}") from None
    return Timing(facts, rows)
