"""What all routers share: choices from scores, soft in training and priced in use, and the training.

A new kind of router implements `scores`. It overrides `loss_fn` to minimise another loss than the paper's, and `fit`
if it is not trained by gradient descent (docs/adding-a-router.md).

Shape letters: B batch, T tokens, L layers, C branches of the router, D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from duollm.config import RouterConfig
from duollm.flops import layer_parameters
from duollm.measure.executor import deciding_flops
from duollm.models.branch import Branch
from duollm.models.configuration_duo import DuoConfig
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.models.policy import Choice, FixedRoutes, Policy, choice_weights
from duollm.oracle.labels import Labels
from duollm.routes.sampling import derived_seed
from duollm.routes.space import RouteSpace
from duollm.training.loop import LossFn, Trainer
from duollm.training.pretrain import prepare_for_training

LABEL_SETTINGS = ("label_tokens", "label_routes", "text_weight")
"""Settings of the kinds that learn from labels: how labels are made, and how they are read."""


@dataclass(frozen=True)
class RouterTraining:
    """Everything that the training of one router may use.

    Attributes:
        model: the model that is routed; frozen unless `config.train_backbone`.
        budget: wanted mean cost per layer, in the units of `branch_costs`; None if one training serves all budgets.
        seed: random seed of the training.
        labels: losses of training tokens under many routes, for a kind with `needs_labels`.
        patterns: static of every budget, [R, L], and its share of big, [R] (`duollm.routers.static`), for a kind with
            `predicts_gains`; None if gains are to be measured along the router's own routes.
    """

    model: DuoForCausalLM
    config: RouterConfig
    trainer: Trainer
    budget: float | None
    seed: int
    labels: Labels | None = None
    patterns: tuple[Tensor, Tensor] | None = None

    @property
    def big_layers(self) -> int:
        """The budget as a number of big layers, of a router that is trained for one budget."""
        assert self.budget is not None
        return round(self.budget * self.model.config.num_hidden_layers)

    def prepare_model(self) -> None:
        """Freeze the model, unless it is trained together with the router, and prepare it for training."""
        self.model.requires_grad_(self.config.train_backbone)
        prepare_for_training(self.model)

    def seed_of(self, step: int, part: int = 0) -> int:
        """Return the random seed of one part of a step. Processes have different seeds, because their texts differ."""
        return derived_seed(self.seed, step, part, self.trainer.world.rank)


class Router(nn.Module):
    """A trained policy; a new kind only has to implement `scores`.

    In training mode a choice is soft, P = softmax(scores / temperature). In evaluation mode it is the branch with
    the highest score - `price` x cost, where `branch_costs` gives the costs. So with two branches a token takes big
    where big beats the other branch by more than the price.

    Where layers vary in groups, the model asks `policy()`, which asks the router at the first layer of each group.

    Args:
        config: configuration of the model that is routed.
        branches: the branches to choose from; big must be among them.

    Attributes:
        space: the routes that the router may take; by default every layer varies by itself.
        settings: names of the fields of `RouterConfig` that only some kinds read, this one among them. If such a
            setting changes, only the kinds that name it are trained again.
        every_budget: whether one training serves all budgets, which then differ only in the price.
        two_branches: whether the kind can choose only between two branches.
        needs_labels: whether the kind learns from `duollm.oracle.labels`.
        predicts_gains: whether the scores are gains (`duollm.routers.marginal`), which can be held to static.
        joint: whether the gradient of the loss reaches the model, so that both can be trained together.
        temperature: temperature of the softmax; the training lowers it.
        price: set by calibration so that the hard choices spend the budget on average.
        exact_price_L: a price for each layer, set by calibration for spending exactly the budget (`ExactBudget`).
        offset_L: what the price of each layer exceeds `price` by (`duollm.routers.static`).
    """

    settings: ClassVar[tuple[str, ...]] = ("budget_weight", "temperatures")
    every_budget: ClassVar[bool] = False
    two_branches: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False
    predicts_gains: ClassVar[bool] = False
    joint: ClassVar[bool] = True
    price: Tensor
    exact_price_L: Tensor
    offset_L: Tensor
    values_C: Tensor
    cost_C: Tensor

    def __init__(self, config: DuoConfig, branches: Sequence[Branch]) -> None:
        super().__init__()
        self.branches = tuple(Branch(branch) for branch in branches)
        if Branch.BIG not in branches or len(set(branches)) < 2 or list(branches) != sorted(set(branches)):
            raise ValueError(
                "a router needs big and at least one other branch, in ascending order, "
                f"got {[branch.name for branch in self.branches]}"
            )
        if self.two_branches and len(self.branches) != 2:
            name = type(self).__name__
            raise ValueError(f"{name} knows two branches, big and another, got {len(self.branches)}")
        self.num_layers, self.hidden_size = config.num_hidden_layers, config.hidden_size
        self.space = RouteSpace(self.num_layers, self.branches)
        self.temperature = 1.0
        self.register_buffer("price", torch.zeros(()))
        self.register_buffer("exact_price_L", torch.zeros(self.num_layers))
        self.register_buffer("offset_L", torch.zeros(self.num_layers), persistent=False)
        self.register_buffer("values_C", torch.tensor(self.branches), persistent=False)
        self.register_buffer("cost_C", branch_costs(config, self.branches)[list(self.branches)], persistent=False)

    def scores(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """Return the scores of the branches, [B, T, C], float32, and the memory for the next layer."""
        raise NotImplementedError

    def margin(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> tuple[Tensor, Tensor, Any]:
        """Return the highest price at which a token takes big, [B, T], the branch it takes above that, and the memory.

        With two branches, this price is the score of big minus the other score.
        """
        scores_BTC, memory = self.scores(layer_idx, states_BTD, memory)
        if len(self.branches) == 2:
            return scores_BTC[..., 1] - scores_BTC[..., 0], self.values_C[0], memory
        other_BT, index_BT = (scores_BTC - self.price * self.cost_C)[..., :-1].max(-1)
        return scores_BTC[..., -1] - other_BT, self.values_C[index_BT], memory

    def mix(self, scores_BTC: Tensor) -> Tensor:
        """Turn scores into weights [B, T, C] that sum to 1. Used in training mode."""
        return (scores_BTC / self.temperature).softmax(-1)

    def set_space(self, space: RouteSpace) -> None:
        """Decide once for each group of layers of `space`, not for each layer."""
        self.space = space

    def policy(self, held: Policy | None = None) -> Policy:
        """Return what the model asks: the router, or `held`, which asks the router in turn, once for each group."""
        return by_group(held or self, self.space)

    def set_budget(self, big_layers: int) -> None:
        """Store the budget, before training for it and before calibration to it. By default this does nothing."""

    def begin(self, position_ids_BT: Tensor, big_layers: int | Tensor | None = None) -> Any:
        """Return the memory for layer 0, by default None.

        Args:
            big_layers: how many big layers each token will spend, a number or [B, 1]; None: the budget on average.
        """
        return None

    def remember(self, layer_idx: int, choice: Tensor, memory: Any) -> Any:
        """Return the memory with the choice added, in the form that `forward` returns. By default it is unchanged."""
        return memory

    def forward(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """Choose for one layer: weights [B, T, 3] in training mode, integers [B, T] otherwise."""
        choice, memory = self.decide(layer_idx, states_BTD, memory)
        return choice, self.remember(layer_idx, choice, memory)

    def decide(
        self, layer_idx: int, states_BTD: Tensor, memory: Any, price: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """Choose as `forward` does, but keep the choice out of the memory. A given `price` replaces the router's."""
        if self.training:
            scores_BTC, memory = self.scores(layer_idx, states_BTD, memory)
            return self.over_all_branches(self.mix(scores_BTC)), memory
        highest_BT, other, memory = self.margin(layer_idx, states_BTD, memory)
        price = self.price + self.offset_L[layer_idx] if price is None else price
        return torch.where(highest_BT > price, int(Branch.BIG), other), memory

    def over_all_branches(self, weights_BTC: Tensor) -> Tensor:
        """Turn weights of this router's branches into weights of all three branches, [B, T, 3]."""
        none_BT3 = weights_BTC.new_zeros(*weights_BTC.shape[:2], len(Branch))
        return none_BT3.index_copy(-1, self.values_C, weights_BTC)

    def flops_per_token(self) -> int:
        """Count the FLOPs of deciding on one token at all layers: a multiplication and an addition per weight.

        A kind overrides this if it does not use each of its weights once per token.
        """
        return 2 * sum(weight.numel() for weight in self.parameters())

    @classmethod
    def check(cls, config: RouterConfig, sequence_length: int) -> None:
        """Raise a UserError if this kind cannot be trained with these settings. By default it always can."""

    def loss_fn(self, training: RouterTraining) -> LossFn:
        """Return the loss that `fit` minimises, by default the paper's."""
        return mixture_loss(self, training, training.trainer.plan.steps)

    def fit(self, training: RouterTraining) -> None:
        """Train this router, and the model if the settings say so; by default by gradient descent on `loss_fn`."""
        training.prepare_model()
        both = nn.ModuleList([self, training.model])
        training.trainer.train(both if training.config.train_backbone else self, self.loss_fn(training))


def mixture_loss(router: Router, training: RouterTraining, steps: int) -> LossFn:
    """Return the loss of the softly mixed model plus the weighted budget loss (paper, section 5).

    The temperature falls geometrically over the steps.
    """
    model, config, budget = training.model, training.config, training.budget
    assert budget is not None
    start, end = config.temperatures

    def loss_fn(batch_BT: Tensor, step: int, part: int) -> tuple[Tensor, dict[str, float]]:
        torch.manual_seed(training.seed_of(step, part))  # for routers that draw
        router.temperature = start * (end / start) ** (step / max(1, steps - 1))
        output = model(input_ids=batch_BT, labels=batch_BT, policy=router.policy(), use_cache=False)
        weights = [choice_weights(choice, output.logits) for choice in output.choices]  # fixed layers are hard
        share = torch.stack([each[..., Branch.BIG].mean() for each in weights]).mean()
        loss = output.loss + config.budget_weight * budget_loss(weights, budget, router)
        return loss, {"nll": output.loss.item(), "big_share": share.item(), "temperature": router.temperature}

    return loss_fn


def budget_loss(weights: Sequence[Tensor], budget: float, router: Router) -> Tensor:
    """Return the mean over sequences of (mean cost over layers and tokens - budget)^2 (paper, section 5).

    The cost is averaged across layers, so layers may differ as long as the mean holds.

    Args:
        weights: per layer the soft choices [B, T, 3].
        budget: wanted mean cost; if nothing is skipped, this is the share of big, 0 .. 1.
    """
    cost_B = torch.stack(
        [(each[..., list(router.branches)] * router.cost_C).sum(-1).mean(-1) for each in weights]
    ).mean(0)
    return (cost_B - budget).square().mean()


class Listener:
    """Policy of given routes, [L] or [B, T, L], that keeps the states that a router would see.

    Attributes:
        states_LBTD: the states of one forward, layer by layer.
    """

    def __init__(self, routes: Tensor) -> None:
        self.given, self.states_LBTD = FixedRoutes(routes), list[Tensor]()

    def __call__(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> tuple[Choice, Any]:
        """Keep the states and return the given choice."""
        self.states_LBTD.append(states_BTD)
        return self.given(layer_idx, states_BTD, memory)


def branch_costs(config: DuoConfig, branches: Sequence[Branch]) -> Tensor:
    """Return the cost of each branch for a token at one layer, [3]: small 0, big 1, skip below 0 by what it saves.

    The unit is the FLOPs by which big exceeds small. So the mean cost over a route's layers is its share of
    big layers if no layer is skipped, and otherwise the share of big that would cost the same. Where small is not among
    the branches, skip costs 0 instead.
    """
    skip, small, big = layer_parameters(config)
    if Branch.SMALL not in branches:
        return torch.tensor([0.0, (small - skip) / (big - skip), 1.0])
    if big == small:
        return torch.tensor([-1.0, 0.0, 1.0])
    return torch.tensor([(skip - small) / (big - small), 0.0, 1.0])


class ByGroup(nn.Module):
    """Asks a policy at the first layer of every group. The other layers follow, and fixed layers take their branch.

    The memory holds the policy's own memory and the choices of the groups so far.
    """

    def __init__(self, policy: Policy, space: RouteSpace) -> None:
        super().__init__()
        self.policy, self.space = policy, space
        self.leader_of = {layer: layers[0] for layers in space.group_layers for layer in layers}

    def begin(self, position_ids_BT: Tensor) -> tuple[Any, dict[int, Choice]]:
        """Return the memory for layer 0."""
        begin = getattr(self.policy, "begin", None)
        return begin and begin(position_ids_BT), {}

    def forward(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> tuple[Choice, Any]:
        """Return the choice of the layer's group, or the branch to which the layer is fixed."""
        if layer_idx in self.space.fixed:
            return self.space.fixed[layer_idx], memory
        inner, taken = memory
        leader = self.leader_of[layer_idx]
        if leader != layer_idx:
            return taken[leader], memory
        choice, inner = self.policy(layer_idx, states_BTD, inner)
        return choice, (inner, taken | {layer_idx: choice})

    def flops_per_token(self) -> int:
        """Count what the policy counts."""
        return deciding_flops(self.policy)


def by_group(policy: Policy, space: RouteSpace) -> Policy:
    """Return the policy, held to one decision per group where layers vary in groups or are fixed."""
    return policy if space.by_layer else ByGroup(policy, space)
