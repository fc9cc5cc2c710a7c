"""Stage 3: train a router for one budget (paper, section 5).

Shape letters: B batch, T tokens.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from duollm.config import RouterConfig
from duollm.data.packed import PackedData
from duollm.flops import token_flops, training_steps
from duollm.models.branch import Branch
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.routing.calibration import calibrate
from duollm.routing.folder import make_router, save_router
from duollm.routing.linear import LinearRouter, budget_loss
from duollm.train.distributed import World
from duollm.train.loop import LossFn, train
from duollm.train.optimizer import TrainingPlan, resolve_precision
from duollm.train.pretrain import prepare_for_training

_BRANCHES = ["small", "big"]
_CALIBRATION_SEQUENCES = 64


def router_name(kind: str, big_layers: int) -> str:
    """The name of a router's folder."""
    return f"{kind}_k{big_layers}"


def train_router(
    model: DuoForCausalLM, config: RouterConfig, big_layers: int, data: PackedData, seed: int, world: World, run: Path
) -> None:
    """Train one router, calibrate it on validation text and write `run/routers/<name>`.

    The model stays as it is, unless the recipe asks to train it too; then its new weights are written
    beside the router, in `model/`.

    Raises:
        UserError: unknown kind of router.
    """
    name, layers = router_name(config.kind, big_layers), model.config.num_hidden_layers
    budget = big_layers / layers
    router = make_router(config.kind, model.config, _BRANCHES).to(world.device)
    model.requires_grad_(config.train_backbone)
    prepare_for_training(model, compile_blocks=False)
    plan = TrainingPlan(
        steps=training_steps(config.tokens, config.batch_size, data.sequence_length),
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        precision=resolve_precision(config.precision),
    )
    batch_at = lambda step: data.train_batch(step, config.batch_size, seed + 1)  # noqa: E731
    loss_fn = soft_routing_loss(model, router, budget, config, plan.steps)
    trained = nn.ModuleList([router, model]) if config.train_backbone else router
    train(name, trained, loss_fn, batch_at, plan, world, run, _flops_per_token(model, data.sequence_length))
    model.eval()
    share = calibrate(model, router, _calibration_batches(data, config.batch_size, world), budget)
    facts = {
        "kind": config.kind,
        "branches": _BRANCHES,
        "big_layers": big_layers,
        "budget": budget,
        "calibrated_share": share,
        "threshold": router.threshold.item(),
    }
    if world.first:
        save_router(router, run / "routers" / name, facts, model if config.train_backbone else None)
        (run / "resume" / f"{name}.pt").unlink(missing_ok=True)
    world.wait()


def soft_routing_loss(
    model: DuoForCausalLM, router: LinearRouter, budget: float, config: RouterConfig, steps: int
) -> LossFn:
    """CE + alpha * budget loss of the soft mixture; the temperature falls geometrically over the steps."""
    start, end = config.temperatures
    router.train()

    def loss_fn(batch_BT: Tensor, step: int, part: int) -> tuple[Tensor, dict[str, float]]:
        router.temperature = start * (end / start) ** (step / max(1, steps - 1))
        output = model(input_ids=batch_BT, labels=batch_BT, policy=router, use_cache=False)
        off_budget = budget_loss(output.choices, budget)
        share = torch.stack([weights[..., Branch.BIG].mean() for weights in output.choices]).mean()
        loss = output.loss + config.budget_weight * off_budget
        return loss, {"nll": output.loss.item(), "big_share": share.item(), "temperature": router.temperature}

    return loss_fn


def _flops_per_token(model: DuoForCausalLM, sequence_length: int) -> float:
    """Forward through both branches, and back to the hidden states but not the frozen weights: 2x forward."""
    return 2 * token_flops(model.config, model.config.num_hidden_layers, sequence_length // 2)


def _calibration_batches(data: PackedData, batch_size: int, world: World) -> list[Tensor]:
    """Validation text, the same for every router."""
    steps = range(-(-_CALIBRATION_SEQUENCES // batch_size))
    batches = [data.train_batch(step, batch_size, seed=0, split="validation") for step in steps]
    return [torch.from_numpy(batch_BT).to(world.device) for batch_BT in batches]
