"""Stage 3: train a router, calibrate it for its budgets and save it (paper, section 5).

Shape letters: B batch, T tokens, W windows.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from duollm.config import RouterConfig
from duollm.flops import token_flops
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.oracle.labels import LABELS, load_labels
from duollm.routers.base import Router, RouterTraining
from duollm.routers.calibration import budget_of, calibrate, calibrate_exact
from duollm.routers.registry import make_router, router_class, save_router
from duollm.routers.static import Prior, calibrate_around, patterns_of
from duollm.routes.space import RouteSpace
from duollm.training.loop import Context, Trainer
from duollm.training.optimizer import TrainingPlan

_CALIBRATION_SEQUENCES = (16, 96)
_CALIBRATION_SHARE = 0.25
"""Calibration reads this share of as many tokens as the training, within these numbers of sequences."""
_CALIBRATION_BATCH = 16


def router_name(kind: str, big_layers: int) -> str:
    """Return the name of a router's folder."""
    return f"{kind}_k{big_layers}"


def trainings(config: RouterConfig) -> list[tuple[str, str, list[int]]]:
    """Return name, kind and budgets of each training: one per budget, or one for all budgets."""
    found: list[tuple[str, str, list[int]]] = []
    for kind in config.kinds:
        if router_class(kind).every_budget:
            found.append((kind, kind, config.big_layers))
        else:
            found += [(router_name(kind, big), kind, [big]) for big in config.big_layers]
    return found


def train_router(
    context: Context,
    model: DuoForCausalLM,
    config: RouterConfig,
    kind: str,
    big_layers: Sequence[int],
    windows_per_document: int,
    space: RouteSpace | None = None,
    priors: Mapping[int, Prior] | None = None,
) -> None:
    """Train one router, calibrate it on validation text for each budget, and write it to `run/routers/<name>`.

    The model does not change, unless `config` asks to train it too; its weights then go into `model/` of that folder.

    Args:
        big_layers: the budgets k; several only for a kind that is trained once for all budgets.
        windows_per_document: windows per validation document, as many as the evaluation takes.
        space: the routes that the router may take; default: every layer varies by itself.
        priors: static of every budget, from which a router of gains starts; default: it starts from its gains alone.

    Raises:
        UserError: unknown kind of router.
    """
    data, world, seed = context.data, context.world, context.seed
    batches = _calibration_batches(context, config, windows_per_document)  # first: the text may be too short
    torch.manual_seed(seed)  # the same first weights in every process and after every interruption
    router = make_router(kind, model.config, list(config.branches), space).to(world.device)
    router.set_budget(big_layers[0])
    name = kind if router.every_budget else router_name(kind, big_layers[0])
    budget = None if router.every_budget else big_layers[0] / router.num_layers
    tokens = config.tokens_for_all if router.every_budget else config.tokens
    # Forward through both branches, and back to the hidden states but not the frozen weights: 2x forward.
    flops_per_token = 2 * token_flops(model.config, router.num_layers, data.sequence_length // 2)
    plan = TrainingPlan.of(config, tokens, data.sequence_length)
    trainer = Trainer.of(name, plan, context, seed + 1, flops_per_token)
    labels = load_labels(context.run / LABELS) if router.needs_labels else None
    patterns = patterns_of({big: priors[big] for big in big_layers}, router.space) if priors else None
    router.fit(RouterTraining(model, config, trainer, budget, seed, labels, patterns))
    model.eval()
    for big in big_layers:
        router.set_budget(big)
        with trainer.autocast():  # what only chooses may be rounded; what is reported is measured in fp32
            if priors:
                spent = calibrate_around(model, router, batches, priors[big], big)
            else:
                spent = calibrate(model, router, batches, budget_of(model.config, router, big))
            calibrate_exact(model, router, batches, big)
        if world.first:
            together = model if config.train_backbone else None
            folder = context.run / "routers" / router_name(kind, big)
            save_router(router, folder, _facts(router, kind, big, spent), together)
    if world.first:
        trainer.checkpoint.unlink(missing_ok=True)
    world.wait()


def _facts(router: Router, kind: str, big_layers: int, spent: float) -> dict[str, Any]:
    """What router.json says of a router (docs/formats.md)."""
    return {
        "kind": kind,
        "branches": [branch.name.lower() for branch in router.branches],
        "big_layers": big_layers,
        "budget": big_layers / router.num_layers,
        "calibrated_share": spent,
        "price": router.price.item(),
    }


def _calibration_batches(context: Context, config: RouterConfig, windows_per_document: int) -> list[Tensor]:
    """Validation text, the same for every router and of the same kind as the text of the evaluation."""
    data, (fewest, most) = context.data, _CALIBRATION_SEQUENCES
    sequences = min(most, max(fewest, round(_CALIBRATION_SHARE * config.tokens / data.sequence_length)))
    token_ids_WT = torch.from_numpy(data.balanced_sample("validation", sequences, windows_per_document, seed=0))
    return list(token_ids_WT.to(context.world.device).chunk(-(-len(token_ids_WT) // _CALIBRATION_BATCH)))
