"""A router that chooses one pattern for a whole sequence, from its first tokens (the prompt).

Per token, the best route is mostly luck. Over a whole sequence luck averages out, so this is where a predictable part
would show. The prompt runs static. Its mean state at one layer predicts the loss of a few patterns, by a ridge
regression, and all later tokens take the pattern with the lowest prediction.

Shape letters: B batch, T tokens, W windows, L layers, D hidden, R patterns.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from duollm.config import RouterConfig
from duollm.errors import UserError
from duollm.measure.executor import policy_losses
from duollm.models.branch import Branch
from duollm.models.configuration_duo import DuoConfig
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.oracle.fixed import draw_patterns
from duollm.routers.base import Listener, RouterTraining
from duollm.routers.codebook import FOLDS, CodebookRouter, choose_routes, price_of_big
from duollm.routers.static import static_priors

_DRAWN = 32  # random patterns of every budget, beside static
_FIRST_SEQUENCES = 8
"""At least, on which all candidates are run."""
_UNTRAINED_PROMPT = 4


class WindowRouter(CodebookRouter):
    """Predicts the mean loss of what follows the prompt under each pattern; one choice for a sequence.

    As in `codebook`, all patterns are the same before layer `decide_at`, and static is the first. The memory is the
    positions, the exact number of big layers (or None), and from `decide_at` on the index of each token's pattern.

    While tokens are decoded with a cache, the prompt is not seen again. So the router keeps the sum of its states from
    one forward to the next, until a sequence starts anew at position 0. A sequence that it did not see start runs
    static. Padding on the left counts as prompt.
    """

    settings = ("codebook_routes", "decide_at", "prompt_tokens")
    saved = (*CodebookRouter.saved, "prompt_tokens")
    needs_labels = False

    def __init__(self, config: DuoConfig, branches: Sequence[Branch]) -> None:
        super().__init__(config, branches)
        self.prompt_tokens = _UNTRAINED_PROMPT
        self.seen: tuple[Tensor, Tensor] | None = None

    def begin(self, position_ids_BT: Tensor, big_layers: int | Tensor | None = None) -> Any:
        """Return the positions, and `big_layers` as in `codebook`."""
        return position_ids_BT, big_layers, None

    def decide(
        self, layer_idx: int, states_BTD: Tensor, memory: Any, price: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """Choose for one layer, integers [B, T]. The layer's price is ignored."""
        position_BT, exactly, route_BT = memory
        if layer_idx < self.decide_at:
            return self.routes_RL[0, layer_idx].expand(states_BTD.shape[:2]), memory
        if layer_idx == self.decide_at:
            mean_BD, known_B1 = self._mean_of_prompt(states_BTD, position_BT)
            route_B1 = self.worth(mean_BD[:, None], exactly).argmax(-1)
            follows_BT = (position_BT >= self.prompt_tokens) & known_B1
            route_BT = torch.where(follows_BT, route_B1, 0)
        return self.routes_RL[:, layer_idx][route_BT], (position_BT, exactly, route_BT)

    def _mean_of_prompt(self, states_BTD: Tensor, position_BT: Tensor) -> tuple[Tensor, Tensor]:
        """The mean state of the prompt so far, [B, D], and whether its start was seen, [B, 1]."""
        inside_BT1 = (position_BT < self.prompt_tokens)[..., None].expand(*states_BTD.shape[:2], 1)
        sum_BD, count_B1 = (states_BTD.detach() * inside_BT1).sum(1), inside_BT1.sum(1)
        if self.seen is not None and self.seen[0].shape == sum_BD.shape:
            continues_B1 = position_BT[:, :1] > 0
            sum_BD, count_B1 = (
                new + old * continues_B1 for new, old in zip((sum_BD, count_B1), self.seen, strict=True)
            )
        self.seen = sum_BD, count_B1
        return sum_BD / count_B1.clamp(min=1), count_B1 > 0

    def flops_per_token(self) -> int:
        """Count the sum over the prompt. The products with the patterns happen once in a sequence."""
        return self.hidden_size

    @classmethod
    def check(cls, config: RouterConfig, sequence_length: int) -> None:
        """Refuse a prompt that fills the window, and too little text to cross-fit."""
        if config.prompt_tokens > sequence_length - 2:
            raise UserError(
                f"prompt_tokens ({config.prompt_tokens}) must leave two of the {sequence_length} tokens of a sequence"
            )
        if config.tokens < FOLDS * sequence_length:
            raise UserError(f"tokens ({config.tokens}): window is cross-fitted over {FOLDS} sequences at least")

    @torch.no_grad()
    def fit(self, training: RouterTraining) -> None:
        """Choose the patterns and fit their losses to the mean states of prompts, in closed form.

        Candidates are static and random patterns of the budget and its neighbours; the first sequences leave as many as
        they would choose with their labels in hand. All batches are then run on each of these, with the prompt on the
        static of the first sequences. These are few, so static and the price of a big layer are chosen again on all
        batches. The other patterns are chosen as those of `codebook`, by cross-fitted predictions. If nothing can be
        predicted, static alone remains.
        """
        training.prepare_model()
        config, model, trainer = training.config, training.model, training.trainer
        big_layers = training.big_layers
        self.prompt_tokens = config.prompt_tokens
        self.decide_by(config.decide_at)
        batches = range(-(-_FIRST_SEQUENCES // trainer.plan.batch_size))
        first_WT = torch.cat([torch.from_numpy(trainer.batch_at(step)) for step in batches]).to(model.device)
        routes_RL, static = self._candidates(model, first_WT, big_layers, training.seed)
        loss_WR = self.losses(model, first_WT, routes_RL, routes_RL[static])
        big_R = (routes_RL == Branch.BIG).sum(-1)
        toll_R = price_of_big(loss_WR.mean(0), big_R) * (big_R - big_layers)
        kept = choose_routes(loss_WR + toll_R, loss_WR + toll_R, static, config.codebook_routes)
        routes_RL, big_R = routes_RL[kept], big_R[kept]
        windows = trainer.plan.steps * trainer.plan.batch_size
        sizes = {"mean_WD": self.hidden_size, "loss_WR": len(kept)}  # of the prompts so far, and of their losses
        seen = nn.ParameterDict({name: torch.zeros(windows, size, device=model.device) for name, size in sizes.items()})

        def take_step(batch_BT: Tensor, step: int) -> dict[str, float]:
            rows = trainer.world.share(torch.arange(trainer.plan.batch_size))
            mean_BD = self._mean_states(model, batch_BT, routes_RL[0])
            loss_BR = self.losses(model, batch_BT, routes_RL, routes_RL[0])
            for into, values in ((seen["mean_WD"], mean_BD), (seen["loss_WR"], loss_BR)):
                of_step = into.new_zeros(trainer.plan.batch_size, into.shape[1])
                of_step[rows] = values
                into[step * len(of_step) : (step + 1) * len(of_step)] = trainer.world.add_up(of_step)
            return {"nll": loss_BR[:, 0].mean().item()}

        trainer.take_steps(self, seen, take_step)
        mean_R = seen["loss_WR"].mean(0)
        static, price = int(mean_R.masked_fill(big_R != big_layers, torch.inf).argmin()), price_of_big(mean_R, big_R)
        loss_WR = seen["loss_WR"] - seen["loss_WR"].mean(1, keepdim=True)  # how hard a text is, no pattern changes
        toll_R = price * (big_R - big_layers)
        self.choose(routes_RL, static, toll_R, seen["mean_WD"], loss_WR, len(loss_WR), config)
        self.price.fill_(price)

    def losses(self, model: DuoForCausalLM, ids_BT: Tensor, routes_RL: Tensor, static_L: Tensor) -> Tensor:
        """Return the mean losses [B, R] of what follows the prompt: the prompt runs static and the rest a pattern."""
        prompt_T = (torch.arange(ids_BT.shape[1], device=ids_BT.device) < self.prompt_tokens)[:, None]
        found = []
        for route_L in routes_RL:
            routes_BTL = torch.where(prompt_T, static_L, route_L).expand(len(ids_BT), -1, -1)
            nll_BT, _ = policy_losses(model, ids_BT, routes=routes_BTL)
            found.append(nll_BT[:, self.prompt_tokens :].mean(1))
        return torch.stack(found, dim=1)

    def _mean_states(self, model: DuoForCausalLM, ids_BT: Tensor, static_L: Tensor) -> Tensor:
        listener = Listener(static_L)
        model.model(input_ids=ids_BT[:, : self.prompt_tokens], policy=listener, use_cache=False)
        return listener.states_LBTD[self.decide_at].float().mean(1)

    def _candidates(self, model: DuoForCausalLM, ids_BT: Tensor, big_layers: int, seed: int) -> tuple[Tensor, int]:
        """Patterns that start like static, [R, L], and which of them is static."""
        possible = self.space.big_layers
        place = possible.index(big_layers)
        around = possible[max(0, place - 1) : place + 2]
        drawn_R = torch.from_numpy(draw_patterns(self.space, around, _DRAWN, seed))
        drawn_R = drawn_R[torch.isin(self.space.count_big(drawn_R), torch.tensor(around))]
        if self.space.base == 2:
            priors = static_priors(model, self.space, ids_BT, around)
            best_R = self.space.encode(torch.stack([prior.route_L.cpu() for prior in priors.values()]))
            drawn_R = torch.cat([drawn_R, best_R]).unique()
        routes_RL = self.space.decode(drawn_R).to(model.device)
        loss_R = self.losses(model, ids_BT, routes_RL, routes_RL[0]).mean(0)
        big_R = (routes_RL == Branch.BIG).sum(-1)
        static_L = routes_RL[loss_R.masked_fill(big_R != big_layers, torch.inf).argmin()]
        routes_RL = routes_RL[(routes_RL[:, : self.decide_at] == static_L[: self.decide_at]).all(-1)]
        return routes_RL, int((routes_RL == static_L).all(-1).nonzero()[0])
