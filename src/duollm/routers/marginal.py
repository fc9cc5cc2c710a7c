"""Marginal gains: what a branch is worth at every token and layer, to first order, from one backward pass.

With gate weights w on the branches, -dL/dw is, to first order, what a branch is worth there: to the loss of this token
and of those that attend to it. `gains`, `deep-gains`, `sequential` and the predictable ceiling are fitted to such
gains.

Shape letters: B batch, T tokens, L layers, J groups of layers (every layer, if they vary by themselves), C branches to
choose from.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from duollm.models.branch import Branch
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.routers.base import Router, by_group
from duollm.routes.space import RouteSpace

GAIN_SCALE = 100.0
"""Scores and price are in nats x this: gains are hundredths of nats, so the weights are of ordinary size."""

_EXPLORED = 0.25
"""Share of (token, layer) whose branch stays random to the end, so that the gain of what is not taken is seen too."""
_WARM_UP = 0.3
"""Share of the training over which the random share falls from 1 to `_EXPLORED`."""
_PRICED_SEQUENCES = 2


def explored_share(progress: float) -> float:
    """Return the share of choices that are random once `progress` (0 .. 1) of a training is done."""
    return max(_EXPLORED, 1 - progress / _WARM_UP * (1 - _EXPLORED))


class RandomGates:
    """Policy of random hard choices, as gate weights that record a gradient.

    Every (token, group of layers) draws its branch. Each sequence has its own probability of big, so that routes of all
    budgets occur.

    Args:
        space: says which branches there are, of which big is the last, and which layers vary together.

    Attributes:
        gates_JBT3: the weights of one forward, group by group.
        big_B1: each sequence's probability of big.
        random_share: the share of choices that `explore` draws at random.
        pattern_BL: the pattern that each sequence follows where it draws nothing (`follow`).
    """

    random_share = 1.0
    pattern_BL: Tensor | None = None

    def __init__(self, space: RouteSpace, batch_BT: Tensor, generator: torch.Generator) -> None:
        self.branches_C = torch.tensor(space.branches, device=batch_BT.device)
        self.generator, self.space = generator, space
        self.gates_JBT3: list[Tensor] = []
        self.big_B1 = torch.rand(len(batch_BT), 1, generator=generator, device=batch_BT.device)

    def __call__(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """Choose for one layer, weights [B, T, 3]."""
        return self.gate(self.drawn(layer_idx, states_BTD), states_BTD), memory

    def drawn(self, layer_idx: int, states_BTD: Tensor) -> Tensor:
        """Return random choices, or those of the patterns with some replaced by random ones, integers [B, T]."""
        if self.pattern_BL is None:
            return self.draw(states_BTD)
        return self.explore(self.pattern_BL[:, layer_idx, None].expand(states_BTD.shape[:2]), states_BTD)

    def follow(self, routes_RL: Tensor, share_R: Tensor) -> None:
        """Let every sequence follow one of these patterns, with their shares of big, but for one group per token."""
        drawn_B = torch.randint(
            len(routes_RL), (len(self.big_B1),), generator=self.generator, device=self.big_B1.device
        )
        self.pattern_BL, self.big_B1 = routes_RL[drawn_B], share_R[drawn_B, None]
        self.random_share = 1 / len(self.space.leaders)

    def draw(self, states_BTD: Tensor) -> Tensor:
        """Draw a branch for every token, integers [B, T]."""
        draw: dict[str, Any] = {"generator": self.generator, "device": states_BTD.device}
        last = len(self.branches_C) - 1
        big_BT = torch.rand(states_BTD.shape[:2], **draw) < self.big_B1
        other_BT = torch.randint(last, states_BTD.shape[:2], **draw)
        return self.branches_C[torch.where(big_BT, last, other_BT)]

    def explore(self, choice_BT: Tensor, states_BTD: Tensor) -> Tensor:
        """Replace some of the choices, integers [B, T], by random ones."""
        random_BT = torch.rand(choice_BT.shape, generator=self.generator, device=choice_BT.device) < self.random_share
        return torch.where(random_BT, self.draw(states_BTD), choice_BT)

    def gate(self, choice_BT: Tensor, states_BTD: Tensor) -> Tensor:
        """Turn a choice, integers [B, T], into one-hot weights [B, T, 3] and keep them."""
        gates_BT3 = one_hot(choice_BT, len(Branch)).to(states_BTD.dtype).requires_grad_()
        self.gates_JBT3.append(gates_BT3)
        return gates_BT3


class RouterGates(RandomGates):
    """Policy of the router's own choices, at a price for each sequence, with some choices replaced by random ones.

    What a layer gains depends on the other layers, so gains are measured on routes that the router will take. Each
    sequence gets its own share of big, uniform in 0 .. 1, and the router decides at the price that spends this share.

    Args:
        off_policy: run all layers big instead. The router still remembers its own choices, so the inputs of its
            decisions stay those of use; the gains are those of layers beside which all others are big.

    Attributes:
        price_B1: the price of big in each sequence; without prices all choices are random.
        scores_JBTC: the router's scores, group by group.
    """

    price_B1: Tensor | None = None

    def __init__(self, router: Router, batch_BT: Tensor, generator: torch.Generator, off_policy: bool = False) -> None:
        super().__init__(router.space, batch_BT, generator)
        self.router, self.off_policy = router, off_policy
        self.scores_JBTC: list[Tensor] = []

    def begin(self, position_ids_BT: Tensor) -> Any:
        """Return the router's memory, made for each sequence's share of big."""
        space = self.router.space
        return self.router.begin(position_ids_BT, space.spent_by_fixed[1] + self.big_B1 * sum(space.group_sizes))

    def __call__(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """Choose for one layer, weights [B, T, 3], and keep the scores."""
        scores_BTC, memory = self.router.scores(layer_idx, states_BTD.detach(), memory)
        self.scores_JBTC.append(scores_BTC)
        choice_BT = self.choose(layer_idx, scores_BTC.detach(), states_BTD)
        executed_BT = torch.full_like(choice_BT, int(Branch.BIG)) if self.off_policy else choice_BT
        chosen_BT3 = one_hot(choice_BT, len(Branch)).to(states_BTD.dtype)
        return self.gate(executed_BT, states_BTD), self.router.remember(layer_idx, chosen_BT3, memory)

    def choose(self, layer_idx: int, scores_BTC: Tensor, states_BTD: Tensor) -> Tensor:
        """Return the router's choices at its prices with some replaced by random ones, integers [B, T]."""
        if self.price_B1 is None:
            return self.drawn(layer_idx, states_BTD)
        worth_BTC = scores_BTC - self.price_B1[..., None] * self.router.cost_C
        return self.explore(self.branches_C[worth_BTC.argmax(-1)], states_BTD)

    def measure(
        self,
        model: DuoForCausalLM,
        batch_BT: Tensor,
        progress: float,
        patterns: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, float]:
        """Run `marginal_gains` along the router's own routes at this `progress` (0 .. 1), or along patterns."""
        if patterns is None:
            self.random_share = explored_share(progress)
            self.price_B1 = self._prices(model, batch_BT)
        else:
            self.follow(*patterns)
        return marginal_gains(model, batch_BT, self)

    @torch.no_grad()
    def _prices(self, model: DuoForCausalLM, batch_BT: Tensor) -> Tensor:
        """The prices at which the router spends each sequence's share of big, [B, 1], estimated on a few of them.

        They are a function of the weights and the step alone, so that a resumed training repeats an uninterrupted one.
        """
        sample_BT = batch_BT[:_PRICED_SEQUENCES]
        drawn = RouterGates(self.router, sample_BT, self.generator, self.off_policy)
        model.model(input_ids=sample_BT, policy=self.router.policy(drawn), use_cache=False)
        pairs = zip(drawn.scores_JBTC, self.router.space.group_sizes, strict=True)
        scores_NC = torch.cat([scores_BTC.flatten(0, 1) for scores_BTC, layers in pairs for _ in range(layers)])
        margin_N = scores_NC[:, -1] - scores_NC[:, :-1].amax(-1)
        return margin_N.quantile((1 - self.big_B1).flatten())[:, None]


def marginal_gains(model: DuoForCausalLM, batch_BT: Tensor, gates: RandomGates) -> tuple[Tensor, float]:
    """Run the model with random gates w and return what each branch gains, and the mean nll.

    The gain is -dL/dw of the batch's summed nll L: to first order, and with what the token's keys and values do
    to later tokens. The gain of a group of layers is divided by their number, so that it compares with a price of big
    per layer.

    Returns:
        gains [J, B, T - 1, C] in nats per layer, of the tokens that predict one, float32; nll in nats per token.
    """
    logits_BTV = model(input_ids=batch_BT, policy=by_group(gates, gates.space), use_cache=False).logits
    nll = cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), batch_BT[:, 1:].flatten(), reduction="sum")
    slopes_JBT3 = torch.stack(torch.autograd.grad(nll, gates.gates_JBT3))
    gains_JBTC = -slopes_JBT3[:, :, :-1, gates.branches_C].float()
    layers_J = gains_JBTC.new_tensor(gates.space.group_sizes)
    return gains_JBTC / layers_J[:, None, None, None], nll.item() / batch_BT[:, 1:].numel()


def centred(values: Tensor) -> Tensor:
    """Subtract the mean over the last dimension, because only differences between branches decide."""
    return values - values.mean(-1, keepdim=True)
