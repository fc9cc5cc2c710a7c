"""Training the offline predictors of the predictable ceiling, all depths and the shuffled control in one pass.

Shape letters: B batch, T tokens, N = B * (T - 1), L layers, C branches to choose from, F features.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from duollm.ceiling.predictor import GainPredictor, all_big_states, make_predictors
from duollm.ceiling.routes import margins, priced_routes
from duollm.config import CeilingConfig
from duollm.flops import token_flops
from duollm.models.branch import Branch
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.records.keys import SHUFFLED
from duollm.routers.marginal import GAIN_SCALE, RandomGates, centred, explored_share, marginal_gains
from duollm.routes.sampling import derived_seed
from duollm.training.loop import Context, LossFn, Trainer
from duollm.training.optimizer import TrainingPlan
from duollm.training.pretrain import prepare_for_training
from duollm.training.world import World


def train_ceiling(
    context: Context, model: DuoForCausalLM, config: CeilingConfig, branches: Sequence[Branch]
) -> nn.ModuleDict:
    """Fit a predictor of gains for every depth and the shuffled control, on training documents.

    Returns:
        The predictors: `l0` ... by depth, and `shuffled`. The model is left frozen, in evaluation mode.

    Raises:
        UserError: a depth that the model does not have.
    """
    world, seed, length = context.world, context.seed, context.data.sequence_length
    predictors = make_predictors(model, config, branches, seed).to(world.device)
    model.requires_grad_(False)
    prepare_for_training(model)
    model.eval()  # no dropout: the states are those that routers meet
    plan = TrainingPlan.of(config, config.tokens, length)
    flops_per_token = 3 * token_flops(model.config, model.config.num_hidden_layers, length // 2)
    trainer = Trainer.of("ceiling", plan, context, seed + 2, flops_per_token)
    trainer.train(predictors, ceiling_loss(model, predictors, branches, plan.steps, seed, world))
    return predictors.eval()


def ceiling_loss(
    model: DuoForCausalLM,
    predictors: nn.ModuleDict,
    branches: Sequence[Branch],
    steps: int,
    seed: int,
    world: World,
) -> LossFn:
    """Squared error of the predicted gains (nats x 100), summed over the predictors.

    Gains are measured along the routes that the deepest predictor would choose, with some of the choices replaced by
    random ones. For the control, the gains of a batch are shuffled among its tokens, so it can learn only what holds
    for all tokens.
    """
    generator = torch.Generator(model.device)
    deepest = [name for name in predictors if name != SHUFFLED][-1]

    def loss_fn(batch_BT: Tensor, step: int, part: int) -> tuple[Tensor, dict[str, float]]:
        generator.manual_seed(derived_seed(seed, step, part, world.rank))
        states_BTF = all_big_states(model, batch_BT)
        gates = _PredictedGates(cast(GainPredictor, predictors[deepest]), states_BTF, branches, batch_BT, generator)
        gates.random_share = explored_share(step / steps)
        gain_LBTC, nll = marginal_gains(model, batch_BT, gates)
        gain_NLC = centred(gain_LBTC * GAIN_SCALE).flatten(1, 2).transpose(0, 1)
        share_N = gates.big_B1.expand(-1, batch_BT.shape[1] - 1).flatten()
        big_NL = torch.stack(gates.gates_LBT3)[:, :, :-1, Branch.BIG].detach().flatten(1).T
        states_NF = states_BTF[:, :-1].flatten(0, 1)
        other_N = torch.randperm(len(share_N), generator=generator, device=generator.device)
        losses = {}
        for name, predictor in predictors.items():
            label_N = other_N if name == SHUFFLED else slice(None)
            predicted_NLC = predictor(states_NF, share_N[label_N], big_NL[label_N])
            error_NLC = centred(predicted_NLC) - gain_NLC[label_N]
            losses[name] = error_NLC.square().sum(-1).mean()
        explained = 1 - losses[deepest].item() / losses[SHUFFLED].item()
        return torch.stack(list(losses.values())).sum(), {"nll": nll, "explained": explained}

    return loss_fn


class _PredictedGates(RandomGates):
    """What a predictor would choose for each sequence's share of big, some of it replaced by random draws."""

    def __init__(
        self,
        predictor: GainPredictor,
        states_BTF: Tensor,
        branches: Sequence[Branch],
        batch_BT: Tensor,
        generator: torch.Generator,
    ) -> None:
        super().__init__(branches, batch_BT, generator)
        nowhere_BTL = torch.zeros(*batch_BT.shape, predictor.shape_LC[0], device=batch_BT.device)
        # Detached, not under no_grad: autocast would keep the copies of the weights that it makes there, graphless.
        gains_BTLC = predictor(states_BTF, self.big_B1.expand(batch_BT.shape), nowhere_BTL).detach()
        margin_BTL, otherwise_BTL = margins(gains_BTLC, predictor.interactions().detach(), branches)
        pairs = zip(margin_BTL, 1 - self.big_B1[:, 0], strict=True)
        price_B = torch.stack([margin_TL.flatten().quantile(other) for margin_TL, other in pairs])
        self.routes_BTL = priced_routes(margin_BTL, otherwise_BTL, price_B[:, None, None])

    def __call__(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """Choose for one layer, weights [B, T, 3]."""
        return self.gate(self.explore(self.routes_BTL[..., layer_idx], states_BTD), states_BTD), memory
