"""One training of one router: all that its loss function needs."""

from dataclasses import dataclass

from duollm.config import RouterConfig
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.oracle.labels import Labels
from duollm.routers.base import Router


@dataclass(frozen=True)
class Lesson:
    """One training of one router.

    Attributes:
        budget: wanted mean cost per layer (`duollm.routers.base.branch_costs`); None for a router that serves all.
        steps: optimiser steps of the training.
        seed, rank: of whatever is drawn; processes draw for texts of their own.
        labels: of training tokens, for a kind that needs them.
    """

    model: DuoForCausalLM
    router: Router
    config: RouterConfig
    budget: float | None
    steps: int
    seed: int
    labels: Labels | None = None
    rank: int = 0
