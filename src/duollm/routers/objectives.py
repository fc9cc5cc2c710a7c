"""What a router is trained to do: the loss functions for the training loop, by name."""

from collections.abc import Callable

from duollm.routers.baselines_training import confidence_loss, expert_choice_loss
from duollm.routers.codebook_training import fit_codebook
from duollm.routers.distilled import distillation_loss
from duollm.routers.gains_training import gains_loss
from duollm.routers.lesson import Lesson
from duollm.routers.mixture import mixture_loss
from duollm.routers.regression import regress_gains
from duollm.training.loop import LossFn

OBJECTIVES: dict[str, Callable[[Lesson], LossFn]] = {
    "mixture": mixture_loss,
    "gains": gains_loss,
    "distillation": distillation_loss,
    "confidence": confidence_loss,
    "expert-choice": expert_choice_loss,
}
"""How routers are trained, by `Router.objective`."""

FITS: dict[str, Callable[[Lesson], None]] = {"codebook": fit_codebook}
"""How routers are fitted that take no steps. One whose objective is in no table is only calibrated."""

REGRESSIONS = {"regression": regress_gains}
"""How routers are fitted that take steps through the data but have no learning rate."""

JOINT = {"mixture", "distillation", "expert-choice"}
"""Objectives whose gradient reaches the model, so that it can be trained together with the router."""
