"""Stage 3: train a router, calibrate it for its budgets and save it (paper, section 5).

Shape letters: B batch, T tokens.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from duollm.config import RouterConfig
from duollm.data.packed import PackedData
from duollm.errors import UserError
from duollm.flops import token_flops, training_steps
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.oracle.labels import LABELS, load_labels
from duollm.routers.base import Router
from duollm.routers.calibration import calibrate, calibrate_exact
from duollm.routers.lesson import Lesson
from duollm.routers.objectives import FITS, JOINT, OBJECTIVES, REGRESSIONS
from duollm.routers.registry import ROUTERS, make_router, router_class, save_router
from duollm.training.loop import train
from duollm.training.optimizer import TrainingPlan, resolve_precision
from duollm.training.pretrain import prepare_for_training
from duollm.training.world import World

_CALIBRATION_SEQUENCES = (16, 96)
_CALIBRATION_SHARE = 0.25
"""Calibration reads this share of as many tokens as the training, within these numbers of sequences."""
_CALIBRATION_BATCH = 16


def router_name(kind: str, big_layers: int) -> str:
    """The name of a router's folder."""
    return f"{kind}_k{big_layers}"


def check_router_settings(config: RouterConfig, sequence_length: int) -> None:
    """Refuse kinds that cannot be trained as asked, before any is.

    Raises:
        UserError: naming the first of them.
    """
    for kind in config.kinds:
        found = router_class(kind)
        if found.two_branches and len(config.branches) != 2:
            branches = ", ".join(config.branches)
            raise UserError(f"router.kinds: {kind} chooses between two branches; router.branches holds {branches}")
        if found.objective in FITS and config.label_tokens < sequence_length:
            raise UserError(
                f"router.label_tokens ({config.label_tokens}): {kind} is cross-fitted over windows; "
                f"give at least {sequence_length} (data.sequence_length) for two of them"
            )
        if config.train_backbone and (
            found.objective not in JOINT or (found.needs_labels and config.distilled_share == 1)
        ):
            joint = ", ".join(name for name, other in ROUTERS.items() if other.objective in JOINT)
            raise UserError(f"router.train_backbone: training {kind} leaves the model as it is; choose among {joint}")


def train_router(
    model: DuoForCausalLM,
    config: RouterConfig,
    kind: str,
    big_layers: Sequence[int],
    data: PackedData,
    windows_per_document: int,
    seed: int,
    world: World,
    run: Path,
) -> None:
    """Train one router and write it to `run/routers/<name>` for each of the budgets, calibrated on validation text.

    The model stays as it is, unless the recipe asks to train it too; then its new weights are written
    beside the router, in `model/`.

    Args:
        big_layers: the budgets k; more than one only for a kind that serves every budget.
        windows_per_document: of the validation text, as many as the evaluation takes.

    Raises:
        UserError: unknown kind of router.
    """
    batches = _calibration_batches(data, config, windows_per_document, world)  # first: the text may be too short
    torch.manual_seed(seed)  # the same first weights in every process and after every interruption
    router = make_router(kind, model.config, list(config.branches)).to(world.device)
    name = kind if router.every_budget else router_name(kind, big_layers[0])
    budget = None if router.every_budget else big_layers[0] / router.num_layers
    router.aim(big_layers[0])
    labels = load_labels(run / LABELS) if router.needs_labels else None
    steps = _steps(config, data.sequence_length, budget)
    lesson = Lesson(model, router, config, budget, steps, seed, labels, world.rank)
    if router.objective in OBJECTIVES or router.objective in REGRESSIONS:
        _train(name, lesson, data, world, run)
    elif router.objective in FITS:
        FITS[router.objective](lesson)
    for big in big_layers:
        router.aim(big)
        spent = calibrate(model, router, batches, big / router.num_layers)
        calibrate_exact(model, router, batches, big)
        if world.first:
            folder = run / "routers" / router_name(kind, big)
            save_router(router, folder, _facts(kind, router, big, spent), model if config.train_backbone else None)
    if world.first:
        (run / "resume" / f"{name}.pt").unlink(missing_ok=True)
    world.wait()


def _steps(config: RouterConfig, sequence_length: int, budget: float | None) -> int:
    """Steps; more without a budget, for all of them."""
    tokens = config.tokens_for_all if budget is None else config.tokens
    return training_steps(tokens, config.batch_size, sequence_length)


def _train(name: str, lesson: Lesson, data: PackedData, world: World, run: Path) -> None:
    model, router, config = lesson.model, lesson.router, lesson.config
    model.requires_grad_(config.train_backbone)
    prepare_for_training(model, compile_blocks=False)
    plan = TrainingPlan(
        steps=lesson.steps,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        precision=resolve_precision(config.precision),
    )
    batch_at = lambda step: data.train_batch(step, config.batch_size, lesson.seed + 1)  # noqa: E731
    flops_per_token = _flops_per_token(model, data.sequence_length)
    if router.objective in REGRESSIONS:
        REGRESSIONS[router.objective](lesson, name, batch_at, plan, world, run, flops_per_token)
    else:
        trained = nn.ModuleList([router, model]) if config.train_backbone else router
        loss_fn = OBJECTIVES[router.objective](lesson)
        train(name, trained, loss_fn, batch_at, plan, world, run, flops_per_token)
    model.eval()


def _facts(kind: str, router: Router, big_layers: int, spent: float) -> dict[str, Any]:
    """What router.json says (docs/formats.md)."""
    return {
        "kind": kind,
        "branches": [branch.name.lower() for branch in router.branches],
        "big_layers": big_layers,
        "budget": big_layers / router.num_layers,
        "calibrated_share": spent,
        "price": router.price.item(),
    }


def _flops_per_token(model: DuoForCausalLM, sequence_length: int) -> float:
    """Forward through both branches, and back to the hidden states but not the frozen weights: 2x forward."""
    return 2 * token_flops(model.config, model.config.num_hidden_layers, sequence_length // 2)


def _calibration_batches(
    data: PackedData, config: RouterConfig, windows_per_document: int, world: World
) -> list[Tensor]:
    """Validation text, the same for every router and of the same kind as the text of the evaluation."""
    fewest, most = _CALIBRATION_SEQUENCES
    sequences = min(most, max(fewest, round(_CALIBRATION_SHARE * config.tokens / data.sequence_length)))
    token_ids_WT = torch.from_numpy(data.balanced_sample("validation", sequences, windows_per_document, seed=0))
    return list(token_ids_WT.to(world.device).chunk(-(-len(token_ids_WT) // _CALIBRATION_BATCH)))
