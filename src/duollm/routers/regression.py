"""Ridge regression of marginal gains while the data stream by: no learning rate, and every token counts alike.

Gains are so noisy (what can be predicted is a hundredth of their variance) that what limits a router is how well each
token is used. The sums of squares and products of a least-squares fit use it fully and can be added up batch by batch.

Shape letters: S folds, B batch, N tokens of a batch, L layers, C branches of the router, F inputs of a layer's map
and, last, a one for the bias.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duollm.routers.gains import GAIN_SCALE
from duollm.routers.gains_training import Watched, prices
from duollm.routers.lesson import Lesson
from duollm.routers.marginal import centred, explored_share, marginal_gains
from duollm.routers.sequential import SequentialRouter
from duollm.routes.sampling import derived_seed
from duollm.training.loop import Batches, run_steps
from duollm.training.optimizer import TrainingPlan
from duollm.training.world import World

_FOLDS = 2
_PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_FITS = 16
"""The router is fitted so many times, evenly over the training; in between it decides by the last fit."""


def regress_gains(
    lesson: Lesson, name: str, batch_at: Batches, plan: TrainingPlan, world: World, run: Path, flops_per_token: float
) -> None:
    """Fit a router to marginal gains along its own routes, as `gains_loss` measures them; arguments as in `train`."""
    model, router = lesson.model, lesson.router
    assert isinstance(router, SequentialRouter)
    sums, generator = RidgeSums(router), torch.Generator(model.device)
    router.train()

    def take_step(batch_BT: Tensor, step: int) -> dict[str, float]:
        generator.manual_seed(derived_seed(lesson.seed, step, 0, lesson.rank))
        with torch.autocast(world.device.type, torch.bfloat16, enabled=plan.precision == "bf16"):
            watched = _Informed(router, batch_BT, generator)
            watched.random_share = explored_share(step / plan.steps)
            watched.price_B1 = prices(model, watched, batch_BT)
            gain_LBTC, nll = marginal_gains(model, batch_BT, watched)
        input_LNF = torch.stack([each_BTF[:, :-1].flatten(0, 1) for each_BTF in watched.inputs]).float()
        sums.add(step, input_LNF, centred(gain_LBTC * GAIN_SCALE).flatten(1, 2), world)
        if step + 1 >= _FOLDS and (step + 1) * _FITS // plan.steps > step * _FITS // plan.steps:
            sums.fit(router)
        return {"nll": nll, "explained": sums.explained, "penalty": sums.penalty}

    run_steps(name, router, sums, take_step, batch_at, plan, world, run, flops_per_token)


class _Informed(Watched):
    """Also keeps the inputs of every decision."""

    def __init__(self, router: SequentialRouter, batch_BT: Tensor, generator: torch.Generator) -> None:
        super().__init__(router, batch_BT, generator)
        self.informed, self.inputs = router.informed, list[Tensor]()

    def __call__(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> tuple[Tensor, Any]:
        self.inputs.append(self.informed(layer_idx, states_BTD.detach(), memory))
        return super().__call__(layer_idx, states_BTD, memory)


class RidgeSums:
    """The sums that a ridge regression per layer needs, in folds, for the choice of the penalty.

    Attributes:
        product_SLFF, aimed_SLFC: sums of x x' and x y', float64, of inputs x (a one last) and targets y.
        square_S: sums of the squares of all targets.
        held: how many of the inputs, the first, have weights that the penalty keeps small.
        penalty: that of the last fit, relative to the mean square of those inputs.
        explained: share of the targets' squares that the last fit explains in the folds that it did not see.
    """

    def __init__(self, router: SequentialRouter) -> None:
        layers, branches, inputs = router.weight_LCD.shape
        sizes: dict[str, Any] = {"dtype": torch.float64, "device": router.weight_LCD.device}
        self.product_SLFF = torch.zeros(_FOLDS, layers, inputs + 1, inputs + 1, **sizes)
        self.aimed_SLFC = torch.zeros(_FOLDS, layers, inputs + 1, branches, **sizes)
        self.square_S = torch.zeros(_FOLDS, **sizes)
        self.held = router.hidden_size + router.random_features
        self.penalty, self.explained = 0.0, 0.0

    def add(self, step: int, input_LNF: Tensor, target_LNC: Tensor, world: World) -> None:
        """Add a batch's tokens, of all processes, to the fold whose turn it is."""
        fold = step % _FOLDS
        x_LNF = torch.nn.functional.pad(input_LNF, (0, 1), value=1.0)
        self.product_SLFF[fold] += world.add_up(x_LNF.mT @ x_LNF)
        self.aimed_SLFC[fold] += world.add_up(x_LNF.mT @ target_LNC)
        self.square_S[fold] += world.add_up(target_LNC.square().sum())

    @torch.no_grad()
    def fit(self, router: SequentialRouter) -> None:
        """Give the router the weights of the penalty whose predictions are best in the folds that were left out."""
        error = {penalty: sum(self._error(penalty, fold) for fold in range(_FOLDS)) for penalty in _PENALTIES}
        self.penalty = min(error, key=lambda penalty: error[penalty])
        self.explained = 1 - error[self.penalty] / self.square_S.sum().item()
        weight_LFC = self._solve(self.penalty, list(range(_FOLDS)))
        router.weight_LCD.copy_(weight_LFC[:, :-1].mT)
        router.bias_LC.copy_(weight_LFC[:, -1])

    def _error(self, penalty: float, fold: int) -> float:
        """Squared error in a fold of the fit to the others."""
        weight_LFC = self._solve(penalty, [other for other in range(_FOLDS) if other != fold])
        quadratic = (weight_LFC * (self.product_SLFF[fold] @ weight_LFC - 2 * self.aimed_SLFC[fold])).sum()
        return (quadratic + self.square_S[fold]).item()

    def _solve(self, penalty: float, folds: list[int]) -> Tensor:
        """Weights [L, F, C]. Those of earlier choices and the bias are not kept small: they are few, and strong."""
        product_LFF, aimed_LFC = self.product_SLFF[folds].sum(0), self.aimed_SLFC[folds].sum(0)
        square_LF = product_LFF.diagonal(dim1=1, dim2=2)
        scale_L1 = square_LF[:, : self.held].mean(1, keepdim=True)
        added_LF = (1e-6 * scale_L1).expand_as(square_LF).clone()  # the inputs of layers to come are zero
        added_LF[:, : self.held] = penalty * scale_L1
        return torch.linalg.solve(product_LFF + torch.diag_embed(added_LF), aimed_LFC)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums, and what the last fit said."""
        return dict(vars(self))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        for name, value in state_dict.items():
            mine = getattr(self, name)
            setattr(self, name, value.to(mine) if isinstance(value, Tensor) else value)
