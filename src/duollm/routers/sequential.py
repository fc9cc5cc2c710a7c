"""A router with memory: its earlier choices and the budget that is left are inputs of every decision.

It is fitted by a ridge regression of marginal gains while the data stream by. There is no learning rate, and every
token counts alike. Only a hundredth of the variance of gains can be predicted, so a router is limited by how well it
uses each token. The sums of squares and products of a least-squares fit use each token fully and can be added up batch
by batch.

Shape letters: B batch, T tokens, N tokens of a batch, L layers, J groups of layers, C branches of the router, D hidden,
K = L + 1 known, H random features, F = D + H + K inputs, G = F + 1 with a one for the bias, S folds.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from duollm.models.branch import Branch
from duollm.models.configuration_duo import DuoConfig
from duollm.ridge import ridge
from duollm.routers.base import RouterTraining, branch_costs
from duollm.routers.gains import GainsRouter
from duollm.routers.marginal import GAIN_SCALE, RouterGates, centred
from duollm.routes.space import RouteSpace
from duollm.training.world import World

_FOLDS = 2
_PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_FREE = 1e-6  # the inputs of choices to come are zero
_FITS = 16
"""The router is fitted so many times, evenly over the training; in between it decides by the last fit."""


class SequentialRouter(GainsRouter):
    """Predicts marginal gains from the state, the choices of earlier layers and the budget that is left.

    A big layer is worth less the more of them follow, which a router that sees only one layer's state cannot know. The
    memory of a token is a vector: the cost of its choice at each layer that decides (1 for big, 0 for small and for
    later layers), and the number of big layers left as a share of all layers. One linear map per layer takes the
    memory, the state, and random features of the state, relu(R x) with a matrix R that is drawn once (Rahimi and Recht,
    "Random features for large-scale kernel machines", 2007). So the map is not linear in the state but is fitted like a
    linear one. Training covers all budgets, so one training serves all; in use the budget is `big_layers`.
    """

    random_features = 64  # 1 % of a forward's FLOPs at width 512; more gain more
    big_layers: Tensor
    step_L3K: Tensor
    random_LHD: Tensor

    def __init__(self, config: DuoConfig, branches: Sequence[Branch]) -> None:
        layers, width = config.num_hidden_layers, config.hidden_size
        super().__init__(config, branches, width + self.random_features + layers + 1)
        # Scaled so that features are as large as the numbers of the state.
        self.register_buffer("random_LHD", torch.randn(layers, self.random_features, width) * (2 / width) ** 0.5)
        self.register_buffer("big_layers", torch.tensor(layers / 2))
        cost_3 = branch_costs(config, branches)
        step_L3K = torch.cat([torch.zeros(layers, 3, layers), -cost_3.expand(layers, 3)[..., None] / layers], dim=-1)
        step_L3K[range(layers), :, range(layers)] = cost_3
        self.register_buffer("step_L3K", step_L3K, persistent=False)

    def set_space(self, space: RouteSpace) -> None:
        """Decide once for each group, whose choice spends as much as all its layers."""
        super().set_space(space)
        for leader, layers in zip(space.leaders, space.group_sizes, strict=True):
            self.step_L3K[leader, :, -1] *= layers

    def set_budget(self, big_layers: int) -> None:
        """Store the budget."""
        self.big_layers.fill_(big_layers)

    def begin(self, position_ids_BT: Tensor, big_layers: int | Tensor | None = None) -> Tensor:
        """Return the memory at layer 0, [B, T, K]: no choices yet, the whole budget left."""
        known_BTK = self.step_L3K.new_zeros(*position_ids_BT.shape, self.num_layers + 1)
        known_BTK[..., -1] = (self.big_layers if big_layers is None else big_layers) / self.num_layers
        return known_BTK

    def inputs_of(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> Tensor:
        """Return the state, its random features and the memory, side by side, [B, T, F]."""
        features_BTH = (states_BTD @ self.random_LHD[layer_idx].to(states_BTD.dtype).T).relu()
        return torch.cat([states_BTD, features_BTH, memory.to(states_BTD.dtype)], dim=-1)

    def remember(self, layer_idx: int, choice: Tensor, memory: Any) -> Any:
        """Store the cost of the choice, hard [B, T] or soft [B, T, 3], and subtract it from what is left."""
        step_3K = self.step_L3K[layer_idx]
        return memory + (choice.to(memory.dtype) @ step_3K if choice.is_floating_point() else step_3K[choice])

    def flops_per_token(self) -> int:
        """Count the FLOPs, those of the random features included."""
        groups, features = len(self.space.leaders), self.random_features * self.hidden_size
        return super().flops_per_token() + 2 * groups * features

    def fit(self, training: RouterTraining) -> None:
        """Fit the marginal gains along the router's own routes by ridge regression."""
        training.prepare_model()
        model, trainer, steps = training.model, training.trainer, training.trainer.plan.steps
        sums, generator = RidgeSums(self), torch.Generator(model.device)

        def take_step(batch_BT: Tensor, step: int) -> dict[str, float]:
            generator.manual_seed(training.seed_of(step))
            with trainer.autocast():
                gates = _RecordingGates(self, batch_BT, generator, self.off_policy)
                gain_JBTC, nll = gates.measure(model, batch_BT, step / steps, training.patterns)
            input_JNF = torch.stack([each_BTF[:, :-1].flatten(0, 1) for each_BTF in gates.inputs_JBTF]).float()
            sums.add(step, input_JNF, centred(gain_JBTC * GAIN_SCALE).flatten(1, 2), trainer.world)
            if step + 1 >= _FOLDS and (step + 1) * _FITS // steps > step * _FITS // steps:
                sums.fit(self)
            return {"nll": nll, "explained": sums.explained, "penalty": sums.penalty}

        trainer.take_steps(self, sums, take_step)


class OffPolicySequentialRouter(SequentialRouter):
    """`SequentialRouter` with labels of the kind "all other layers run big", which are not those of its own routes."""

    off_policy = True


class _RecordingGates(RouterGates):
    """Keeps the inputs of every decision."""

    def __init__(
        self, router: SequentialRouter, batch_BT: Tensor, generator: torch.Generator, off_policy: bool
    ) -> None:
        super().__init__(router, batch_BT, generator, off_policy)
        self.inputs_of, self.inputs_JBTF = router.inputs_of, list[Tensor]()

    def __call__(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> tuple[Tensor, Any]:
        self.inputs_JBTF.append(self.inputs_of(layer_idx, states_BTD.detach(), memory))
        return super().__call__(layer_idx, states_BTD, memory)


class RidgeSums:
    """The sums that a ridge regression per group needs, one set per fold, so that the penalty can be cross-validated.

    Attributes:
        product_SJGG, aimed_SJGC: sums of x x' and x y', float64, over inputs x (the last one is 1) and targets y.
        square_S: sums of the squares of all targets.
        held: number of inputs, the first ones, whose weights are penalised. Those of earlier choices and the bias are
            not, because they are few and strong.
        penalty: penalty of the last fit, relative to the mean square of those inputs.
        explained: share of the targets' squares that the last fit explains in the folds that it did not see.
    """

    def __init__(self, router: SequentialRouter) -> None:
        groups, (_, branches, inputs) = len(router.space.leaders), router.weight_LCD.shape
        sizes: dict[str, Any] = {"dtype": torch.float64, "device": router.weight_LCD.device}
        self.product_SJGG = torch.zeros(_FOLDS, groups, inputs + 1, inputs + 1, **sizes)
        self.aimed_SJGC = torch.zeros(_FOLDS, groups, inputs + 1, branches, **sizes)
        self.square_S = torch.zeros(_FOLDS, **sizes)
        self.held = router.hidden_size + router.random_features
        self.penalty, self.explained = 0.0, 0.0

    def add(self, step: int, input_JNF: Tensor, target_JNC: Tensor, world: World) -> None:
        """Add the tokens of a batch, over all processes, to the fold whose turn it is."""
        fold, x_JNG = step % _FOLDS, pad(input_JNF, (0, 1), value=1.0)
        self.product_SJGG[fold] += world.add_up(x_JNG.mT @ x_JNG)
        self.aimed_SJGC[fold] += world.add_up(x_JNG.mT @ target_JNC)
        self.square_S[fold] += world.add_up(target_JNC.square().sum())

    @torch.no_grad()
    def fit(self, router: SequentialRouter) -> None:
        """Solve with the penalty that predicts best in the folds left out, and give the weights to the router."""
        error = {penalty: sum(self._error(penalty, fold) for fold in range(_FOLDS)) for penalty in _PENALTIES}
        self.penalty = min(error, key=lambda penalty: error[penalty])
        self.explained = 1 - error[self.penalty] / self.square_S.sum().item()
        weight_JGC = self._solve(self.penalty, list(range(_FOLDS))).to(router.weight_LCD)
        router.weight_LCD[router.space.leaders] = weight_JGC[:, :-1].mT
        router.bias_LC[router.space.leaders] = weight_JGC[:, -1]

    def _error(self, penalty: float, fold: int) -> float:
        """Squared error in a fold of the fit to the others."""
        weight_JGC = self._solve(penalty, [other for other in range(_FOLDS) if other != fold])
        quadratic = (weight_JGC * (self.product_SJGG[fold] @ weight_JGC - 2 * self.aimed_SJGC[fold])).sum()
        return (quadratic + self.square_S[fold]).item()

    def _solve(self, penalty: float, folds: list[int]) -> Tensor:
        return ridge(self.product_SJGG[folds].sum(0), self.aimed_SJGC[folds].sum(0), penalty, self.held, _FREE)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums and the results of the last fit."""
        return dict(vars(self))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        for name, value in state_dict.items():
            mine = getattr(self, name)
            setattr(self, name, value.to(mine) if isinstance(value, Tensor) else value)
