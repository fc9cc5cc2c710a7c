"""The kinds of router by name; saving and loading routers.

To add a kind, write a file like `routers/linear.py` and enter its class in `ROUTERS` (docs/adding-a-router.md).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from duollm.config import RouterConfig
from duollm.convert.saving import load_model
from duollm.errors import UserError, did_you_mean, in_a_line
from duollm.files import read_json, replacing, write_json
from duollm.measure.comparison import TrainedRouter
from duollm.models.configuration_duo import DuoConfig
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.routers.base import Router, branch_costs
from duollm.routers.baselines import EarlyExitRouter, MixtureOfDepthsRouter, RandomRouter
from duollm.routers.calibration import ExactBudget
from duollm.routers.codebook import CodebookRouter
from duollm.routers.gains import DeepGainsRouter, GainsRouter, OffPolicyGainsRouter
from duollm.routers.knn import KnnRouter
from duollm.routers.linear import DistilledRouter, GumbelRouter, LinearRouter
from duollm.routers.sequential import OffPolicySequentialRouter, SequentialRouter
from duollm.routers.window import WindowRouter
from duollm.routes.space import RouteSpace, parse_branches

ROUTERS: dict[str, type[Router]] = {
    "linear": LinearRouter,
    "gumbel": GumbelRouter,
    "gains": GainsRouter,
    "deep-gains": DeepGainsRouter,
    "sequential": SequentialRouter,
    "gains-off-policy": OffPolicyGainsRouter,
    "sequential-off-policy": OffPolicySequentialRouter,
    "distilled": DistilledRouter,
    "codebook": CodebookRouter,
    "knn": KnnRouter,
    "window": WindowRouter,
    "random": RandomRouter,
    "early-exit": EarlyExitRouter,
    "mixture-of-depths": MixtureOfDepthsRouter,
}
"""Every kind of router by name."""


def router_class(kind: str) -> type[Router]:
    """Return the class of a named kind.

    Raises:
        UserError: unknown kind.
    """
    if kind not in ROUTERS:
        raise UserError(f"unknown router {kind!r}; {did_you_mean(kind, ROUTERS)}")
    return ROUTERS[kind]


def check_kinds(config: RouterConfig, sequence_length: int) -> None:
    """Refuse kinds that cannot be trained with these settings, before any training.

    Raises:
        UserError: for the first such kind. The message begins with the name of a setting.
    """
    for kind in config.kinds:
        if kind not in ROUTERS:
            raise UserError(f"kinds: unknown router {kind!r}; {did_you_mean(kind, ROUTERS)}")
        if ROUTERS[kind].two_branches and len(config.branches) != 2:
            branches = ", ".join(config.branches)
            raise UserError(f"kinds: {kind} chooses between two branches; branches holds {branches}")
        if config.around_static and ROUTERS[kind].predicts_gains and len(config.branches) != 2:
            raise UserError(f"around_static: {kind} is then held to two branches; branches holds {config.branches}")
        if config.train_backbone and not ROUTERS[kind].joint:
            joint = ", ".join(name for name, other in ROUTERS.items() if other.joint)
            raise UserError(f"train_backbone: training {kind} leaves the model as it is; choose among {joint}")
        ROUTERS[kind].check(config, sequence_length)


def settings_of(kind: str, config: RouterConfig) -> dict[str, Any]:
    """Return the settings that the training of this kind depends on: all except those that only other kinds read."""
    mine = router_class(kind).settings
    others = {name for other in ROUTERS.values() for name in other.settings} - set(mine)
    unused = others if config.around_static and router_class(kind).predicts_gains else {"around_static", *others}
    return config.model_dump(exclude={"kinds", "big_layers", "spend", *unused})


def make_router(kind: str, config: DuoConfig, branches: list[str], space: RouteSpace | None = None) -> Router:
    """Build an untrained router of a named kind for a model; `branches` by name, e.g. ["small", "big"].

    Args:
        space: the routes that it may take, of the same branches. Default: every layer varies by itself.

    Raises:
        UserError: unknown kind.
    """
    router = router_class(kind)(config, parse_branches(branches))
    if space is not None and not space.by_layer:
        router.set_space(space)
    return router


def save_router(router: Router, folder: Path, facts: dict[str, Any], model: DuoForCausalLM | None = None) -> None:
    """Write router.safetensors and router.json. `facts` must have `kind` and `branches`; the router's space is added.

    A model that was trained together with the router goes into `model/` beside them.
    """
    with replacing(folder) as temporary:
        temporary.mkdir()
        save_file(router.state_dict(), temporary / "router.safetensors")
        if not router.space.by_layer:
            facts = facts | router.space.facts
        if router.offset_L.any():
            facts = facts | {"offsets": router.offset_L.tolist()}
        write_json(temporary / "router.json", facts)
        if model is not None:
            model.save_pretrained(temporary / "model")


def load_router(folder: Path, config: DuoConfig) -> tuple[Router, dict[str, Any]]:
    """Read what `save_router` wrote; return the router in evaluation mode and its facts.

    Raises:
        UserError: files are missing or damaged, or the router is for another model.
    """
    try:
        facts = read_json(folder / "router.json")
        space = RouteSpace.from_facts(facts | {"num_layers": config.num_hidden_layers})
        router = make_router(facts["kind"], config, facts["branches"], space)
        router.load_state_dict(load_file(folder / "router.safetensors"))
        router.offset_L += torch.tensor(facts.get("offsets", 0.0))
    except UserError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        reason = in_a_line(error)
        raise UserError(f"{folder}: not a router folder ({reason}); train one with `duollm train-router`") from None
    except RuntimeError:
        raise UserError(f"{folder}: was trained for a model of other sizes; train one for this model") from None
    return router.eval(), facts


def trained_routers(
    run: Path, names: Sequence[str], spend: Sequence[str], model: DuoForCausalLM
) -> Iterator[TrainedRouter]:
    """Load the routers of a run one by one, each with every way of spending. Exact spending adds `_exact` to the name.

    A router that was trained together with a model comes with that model.
    """
    for name in names:
        router, facts = load_router(run / "routers" / name, model.config)
        router.to(model.device)
        together = run / "routers" / name / "model"
        backbone = load_model(together) if together.exists() else model
        nn.Module.to(backbone, model.device)
        for way in spend:
            policy = router.policy(ExactBudget(router, facts["big_layers"]) if way == "exact" else None)
            known = facts | {"spend": way, "branch_costs": branch_costs(model.config, router.branches).tolist()}
            yield TrainedRouter(f"{name}_exact" if way == "exact" else name, backbone, policy, router.branches, known)
