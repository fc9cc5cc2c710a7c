"""The predictable ceiling: an offline prediction of what each branch gains (docs/concepts.md), and its choices.

The predictor sees the hidden states of a pass in which all layers are big, at layers 0 .. depth. It decides for all
layers at once, also for those before `depth`. So no router can do the same. It never sees a label.

Shape letters: B batch, T tokens, N = B * (T - 1), L layers, J groups of layers (every layer by itself, or several
together), C branches to choose from, D hidden, F = (depth + 1) * D features. A dot stands for any leading dimensions.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from duollm.config import CeilingConfig
from duollm.flops import token_flops
from duollm.models.branch import Branch
from duollm.models.configuration_duo import DuoConfig
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.records.keys import SHUFFLED
from duollm.routers.base import Listener
from duollm.routers.marginal import GAIN_SCALE, RandomGates, centred, explored_share, marginal_gains
from duollm.routes.sampling import derived_seed
from duollm.routes.space import RouteSpace
from duollm.training.loop import Context, LossFn, Trainer
from duollm.training.optimizer import TrainingPlan
from duollm.training.pretrain import prepare_for_training
from duollm.training.world import World

_TOLD = 5.0
_TIE = 1e-4  # far below what a gain (nats x 100) can be told from, far above the rounding of float32


class GainPredictor(nn.Module):
    """A linear map, and a bottleneck beside it (F -> width -> J x C, GELU), from hidden states to gains.

    A second linear map gets as inputs in which groups the token itself takes big, and the share of big of the other
    tokens. Layers stand in for each other, so what a big layer adds depends on which other layers are big.

    Args:
        space: the routes to choose among.
        depth: the last layer whose states the predictor sees.
        width: inner width of the bottleneck.
    """

    def __init__(self, config: DuoConfig, space: RouteSpace, depth: int, width: int) -> None:
        super().__init__()
        groups = len(space.leaders)
        self.depth, self.shape_JC = depth, (groups, space.base)
        self.features, gains = (depth + 1) * config.hidden_size, groups * space.base
        self.told = nn.Linear(2 + groups, gains, bias=False)
        self.linear = nn.Linear(self.features, gains, bias=False)
        self.inner = nn.Linear(self.features, width)
        self.outer = nn.Linear(width, gains, bias=False)
        nn.init.normal_(self.inner.weight)
        for zero in (self.told.weight, self.linear.weight, self.inner.bias, self.outer.weight):
            nn.init.zeros_(zero)

    def forward(self, states: Tensor, share: Tensor, big: Tensor) -> Tensor:
        """Return the predicted gains [., J, C] per layer, float32, in the units of the training.

        Args:
            states: [., F] as `all_big_states` returns them. States of further layers are ignored.
            share: share of big of the other tokens, among the layers that vary, [.].
            big: 1 where the token itself takes big, else 0, [., J].
        """
        return self.from_states(states) + self.from_told(share, big)

    def from_states(self, states: Tensor) -> Tensor:
        """The part of the gains that the states decide, [., J, C]."""
        # Weights are of size 1 whatever the width, so one learning rate suits all depths.
        seen = states[..., : self.features] * self.features**-0.5
        hidden = nn.functional.gelu(self.inner(seen))
        gains = self.linear(seen) + self.outer(hidden * hidden.shape[-1] ** -0.5)
        return gains.float().unflatten(-1, self.shape_JC)

    def from_told(self, share: Tensor, big: Tensor) -> Tensor:
        """The part of the gains that is known without the states, [., J, C]."""
        # Larger than a feature, for what holds for all tokens has to be learnt in few steps.
        told = _TOLD * torch.cat([torch.ones_like(share)[..., None], share[..., None], big], dim=-1)
        return self.told(told).float().unflatten(-1, self.shape_JC)

    def interactions(self) -> Tensor:
        """By how much big at one group (first dimension) changes the gains at another, [J, J, C]."""
        return _TOLD * self.told.weight[:, 2:].T.unflatten(-1, self.shape_JC)


def train_ceiling(
    context: Context,
    model: DuoForCausalLM,
    config: CeilingConfig,
    space: RouteSpace,
    patterns: tuple[Tensor, Tensor] | None = None,
) -> nn.ModuleDict:
    """Fit a predictor of gains for every depth and the shuffled control, on training documents.

    Args:
        patterns: static of every budget and its share of big, along which gains are measured, in place of the routes
            that the deepest predictor would choose.

    Returns:
        The predictors: `l0` ... by depth, and `shuffled`. The model is left frozen, in evaluation mode.

    Raises:
        UserError: a depth that the model does not have.
    """
    world, seed, length = context.world, context.seed, context.data.sequence_length
    predictors = make_predictors(model, config, space, seed).to(world.device)
    model.requires_grad_(False)
    prepare_for_training(model)
    model.eval()  # no dropout: the states are those that routers meet
    plan = TrainingPlan.of(config, config.tokens, length)
    flops_per_token = 3 * token_flops(model.config, model.config.num_hidden_layers, length // 2)
    trainer = Trainer.of("ceiling", plan, context, seed + 2, flops_per_token)
    trainer.train(predictors, ceiling_loss(model, predictors, space, plan.steps, seed, world, patterns))
    return predictors.eval()


def make_predictors(model: DuoForCausalLM, config: CeilingConfig, space: RouteSpace, seed: int) -> nn.ModuleDict:
    """Build an untrained predictor for every depth and the control.

    Raises:
        UserError: a depth that the model does not have.
    """
    depths = config.depths_in(model.config.num_hidden_layers)
    torch.manual_seed(seed)
    named = {f"l{depth}": depth for depth in depths} | {SHUFFLED: depths[-1]}
    return nn.ModuleDict(
        {name: GainPredictor(model.config, space, depth, config.width) for name, depth in named.items()}
    )


def ceiling_loss(
    model: DuoForCausalLM,
    predictors: nn.ModuleDict,
    space: RouteSpace,
    steps: int,
    seed: int,
    world: World,
    patterns: tuple[Tensor, Tensor] | None = None,
) -> LossFn:
    """Squared error of the predicted gains (nats x 100), summed over the predictors.

    Gains are measured along the routes that the deepest predictor would choose, or along `patterns`, with some of the
    choices replaced by random ones. For the control, the gains of a batch are shuffled among its tokens, so it can
    learn only what holds for all tokens.
    """
    generator = torch.Generator(model.device)
    deepest = [name for name in predictors if name != SHUFFLED][-1]

    def loss_fn(batch_BT: Tensor, step: int, part: int) -> tuple[Tensor, dict[str, float]]:
        generator.manual_seed(derived_seed(seed, step, part, world.rank))
        states_BTF = all_big_states(model, batch_BT)
        if patterns is None:
            chooser = cast(GainPredictor, predictors[deepest])
            gates: RandomGates = _PredictedGates(chooser, states_BTF, space, batch_BT, generator)
            gates.random_share = explored_share(step / steps)
        else:
            gates = RandomGates(space, batch_BT, generator)
            gates.follow(*patterns)
        gain_JBTC, nll = marginal_gains(model, batch_BT, gates)
        gain_NJC = centred(gain_JBTC * GAIN_SCALE).flatten(1, 2).transpose(0, 1)
        share_N = gates.big_B1.expand(-1, batch_BT.shape[1] - 1).flatten()
        big_NJ = torch.stack(gates.gates_JBT3)[:, :, :-1, Branch.BIG].detach().flatten(1).T
        states_NF = states_BTF[:, :-1].flatten(0, 1)
        other_N = torch.randperm(len(share_N), generator=generator, device=generator.device)
        losses = {}
        for name, predictor in predictors.items():
            label_N = other_N if name == SHUFFLED else slice(None)
            predicted_NJC = predictor(states_NF, share_N[label_N], big_NJ[label_N])
            error_NJC = centred(predicted_NJC) - gain_NJC[label_N]
            losses[name] = error_NJC.square().sum(-1).mean()
        explained = 1 - losses[deepest].item() / losses[SHUFFLED].item()
        return torch.stack(list(losses.values())).sum(), {"nll": nll, "explained": explained}

    return loss_fn


class _PredictedGates(RandomGates):
    """What a predictor would choose for each sequence's share of big, some of it replaced by random draws."""

    def __init__(
        self,
        predictor: GainPredictor,
        states_BTF: Tensor,
        space: RouteSpace,
        batch_BT: Tensor,
        generator: torch.Generator,
    ) -> None:
        super().__init__(space, batch_BT, generator)
        nowhere_BTJ = torch.zeros(*batch_BT.shape, predictor.shape_JC[0], device=batch_BT.device)
        # Detached, not under no_grad: autocast would keep the copies of the weights that it makes there, graphless.
        gains_BTJC = predictor(states_BTF, self.big_B1.expand(batch_BT.shape), nowhere_BTJ).detach()
        margin_BTJ, otherwise_BTJ = margins(gains_BTJC, predictor.interactions().detach(), space.branches)
        of_layers = per_layer(margin_BTJ, space)
        pairs = zip(of_layers, 1 - self.big_B1[:, 0], strict=True)
        price_B = torch.stack([each.flatten().quantile(other) for each, other in pairs])
        choice_BTJ = priced_choice(margin_BTJ, otherwise_BTJ, price_B[:, None, None])
        self.choice_of = dict(zip(space.leaders, choice_BTJ.unbind(-1), strict=True))

    def __call__(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """Choose for one layer, weights [B, T, 3]."""
        return self.gate(self.explore(self.choice_of[layer_idx], states_BTD), states_BTD), memory


@torch.no_grad()
def all_big_states(model: DuoForCausalLM, batch_BT: Tensor) -> Tensor:
    """Return what routers see at every layer when all layers are big, side by side, [B, T, L * D]."""
    seen = Listener(torch.full((model.config.num_hidden_layers,), int(Branch.BIG)))
    model.model(input_ids=batch_BT, policy=seen, use_cache=False)
    return torch.cat(seen.states_LBTD, dim=-1)


def margins(gains: Tensor, interactions: Tensor, branches: Sequence[Branch]) -> tuple[Tensor, Tensor]:
    """Make groups big one after another, the largest gain first, and return what each gained in its turn.

    A gain is the mean of those predicted with and without big at the group itself (the slopes at both ends of the
    step). A turn that gains more than the one before counts as gaining as much, so taking groups down to any margin
    takes the first turns.

    Args:
        gains: predicted where the token takes big nowhere, [., J, C].
        interactions: [J, J, C], see `GainPredictor.interactions`.

    Returns:
        by how much big beat the best other branch, strictly falling in the order of the turns; and which branch that
        is where nothing is big; both [., J].
    """
    gains = gains + interactions.diagonal().T / 2
    otherwise = torch.tensor(branches, device=gains.device)[gains[..., :-1].argmax(-1)]
    margin = torch.full_like(gains[..., 0], -torch.inf)
    least = torch.full_like(margin[..., :1], torch.inf)
    taken = torch.zeros_like(margin, dtype=torch.bool)
    for _ in range(margin.shape[-1]):
        beats = (gains[..., -1] - gains[..., :-1].amax(-1)).masked_fill(taken, -torch.inf)
        most, group = beats.max(-1, keepdim=True)
        least = torch.minimum(least - _TIE, most)
        margin.scatter_(-1, group, least)
        taken.scatter_(-1, group, True)
        gains = gains + interactions[group[..., 0]]
    return margin, otherwise


def priced_choice(margin: Tensor, otherwise: Tensor, price: float | Tensor) -> Tensor:
    """Return the branches of the groups, [., J]: big where its gain exceeds the price."""
    return torch.where(margin > price, int(Branch.BIG), otherwise)


def per_layer(margin: Tensor, space: RouteSpace) -> Tensor:
    """Repeat the margin of each group, [., J], for each of its layers."""
    return margin.repeat_interleave(torch.tensor(space.group_sizes, device=margin.device), dim=-1)


def exact_choice(margin: Tensor, otherwise: Tensor, big_layers: int, space: RouteSpace) -> Tensor:
    """Return the branches of the groups, [., J]: every token takes exactly `big_layers`, where they gain most in all.

    A dynamic program over the groups, for groups of several sizes need not be taken in the order of their gains.
    """
    wanted = big_layers - space.spent_by_fixed[1]
    best = torch.full((*margin.shape[:-1], wanted + 1), -torch.inf, dtype=torch.float64, device=margin.device)
    best[..., 0] = 0
    taken = []
    for group, layers in enumerate(space.group_sizes):
        with_big = torch.full_like(best, -torch.inf)
        with_big[..., layers:] = best[..., : max(0, wanted + 1 - layers)] + layers * margin[..., group, None].double()
        taken.append(with_big > best)
        best = torch.maximum(best, with_big)
    left, choice = torch.full_like(margin[..., :1], wanted, dtype=torch.int64), otherwise.clone()
    for group in reversed(range(len(taken))):
        big = taken[group].gather(-1, left)
        choice[..., group] = torch.where(big[..., 0], int(Branch.BIG), otherwise[..., group])
        left = left - space.group_sizes[group] * big.long()
    return choice


def price_for(margin: Tensor, big_layers: int, space: RouteSpace) -> float:
    """Return the price at which `big_layers` layers are big on average over tokens."""
    of_layers = per_layer(margin, space)
    spent = round(of_layers.numel() * (big_layers - space.spent_by_fixed[1]) / of_layers.shape[-1])
    descending = of_layers.flatten().sort(descending=True).values
    return float("-inf") if spent == len(descending) else descending[spent].item()
