"""Regression of marginal gains: what a branch is worth at every token and layer, from one backward pass.

Shape letters: B batch, T tokens, L layers, C branches of the router.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from duollm.models.branch import Branch
from duollm.routing.gains import GainsRouter
from duollm.routing.router import Router
from duollm.routing.sampling import derived_seed
from duollm.train.lesson import Lesson
from duollm.train.loop import LossFn


def gains_loss(lesson: Lesson) -> LossFn:
    """Squared error of predicted marginal gains, with the hidden states of routes that mix all budgets.

    In each sequence every (token, layer) draws its branch, big with a probability of that sequence's own. The model
    runs with these choices as gate weights w; -dL/dw of the summed nll L of the batch is what a branch gains, to first
    order, including what the token's keys and values do to later tokens. The gain of a branch counts from the mean
    over the router's branches, for only differences between branches decide.
    """
    model, router = lesson.model, lesson.router
    assert isinstance(router, GainsRouter)
    generator = torch.Generator(model.device)
    router.train()

    def loss_fn(batch_BT: Tensor, step: int, part: int) -> tuple[Tensor, dict[str, float]]:
        generator.manual_seed(derived_seed(lesson.seed, step, part))
        watched = _Gates(router, batch_BT, generator)
        logits_BTV = model(input_ids=batch_BT, policy=watched, use_cache=False).logits
        nll = cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), batch_BT[:, 1:].flatten(), reduction="sum")
        slopes = torch.autograd.grad(nll, watched.gates_LBT3)
        branches = list(router.branches)
        gain_LBTC = -torch.stack(slopes)[:, :, :-1, branches].float() * router.scale
        predicted_LBTC = torch.stack(watched.scores_LBTC)[:, :, :-1]
        error = _centred(predicted_LBTC) - _centred(gain_LBTC)
        loss = error.square().sum(-1).mean()
        return loss, {"nll": nll.item() / batch_BT[:, 1:].numel(), "gain_variance": gain_LBTC.var().item()}

    return loss_fn


class _Gates:
    """Random choices as gate weights whose gradient is wanted, and what the router would have said."""

    def __init__(self, router: Router, batch_BT: Tensor, generator: torch.Generator) -> None:
        self.router, self.generator = router, generator
        self.gates_LBT3: list[Tensor] = []
        self.scores_LBTC: list[Tensor] = []
        self.big_B1 = torch.rand(len(batch_BT), 1, generator=generator, device=batch_BT.device)

    def __call__(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> tuple[Tensor, Any]:
        scores_BTC, memory = self.router.scores(layer_idx, states_BTD.detach(), memory)
        self.scores_LBTC.append(scores_BTC)
        branches = self.router.values_C
        draw = {"generator": self.generator, "device": states_BTD.device}
        big_BT = torch.rand(states_BTD.shape[:2], **draw) < self.big_B1
        other_BT = torch.randint(len(branches) - 1, states_BTD.shape[:2], **draw)
        choice_BT = branches[torch.where(big_BT, len(branches) - 1, other_BT)]
        gates_BT3 = torch.nn.functional.one_hot(choice_BT, len(Branch)).to(states_BTD.dtype).requires_grad_()
        self.gates_LBT3.append(gates_BT3)
        return gates_BT3, memory


def _centred(values: Tensor) -> Tensor:
    """Less the mean over the last dimension."""
    return values - values.mean(-1, keepdim=True)
