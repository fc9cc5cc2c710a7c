"""Policies by name: what `--policy` takes on the command line.

To add one, write a function that turns its argument and the model into a policy and enter it in `POLICIES`.

Shape letters: B batch, T tokens, L layers, D hidden.
"""

from collections.abc import Callable, Sequence
from os.path import isdir
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duollm.config import LARGEST_SEED
from duollm.errors import UserError, did_you_mean
from duollm.models.branch import Branch
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.models.policy import FixedRoutes, Policy
from duollm.routers.registry import load_router
from duollm.routes.sampling import pattern, spread_layers, uniform_hash


def parse_policy(text: str, model: DuoForCausalLM) -> Policy:
    """Return the policy that `text` names, such as "all-big", "random:0.25" or the folder of a router.

    Raises:
        UserError: unknown name, or an argument that is not allowed for this model.
    """
    name, _, argument = text.partition(":")
    if name not in POLICIES and isdir(text):
        name, argument = "router", text
    if name not in POLICIES:
        raise UserError(f"unknown policy {text!r}; {did_you_mean(name, policy_forms())}, or a router's folder")
    _, make = POLICIES[name]
    return make(argument, model)


def policy_forms() -> list[str]:
    """Return how each named policy is written, e.g. "random:SHARE[:SEED]"."""
    return [form for form, _ in POLICIES.values()]


class RandomShare:
    """Each (token, layer) is big with probability `share`, else small.

    The draw is a hash of seed, position and layer. It is the same in a full forward, in cached decoding and in any
    batch, and tokens at the same position of different texts take the same route.
    """

    def __init__(self, share: float, seed: int = 0) -> None:
        self.share, self.seed = share, seed

    def begin(self, position_ids_BT: Tensor) -> Tensor:
        """Return the positions, which pass from layer to layer as the memory."""
        return position_ids_BT

    def __call__(self, layer_idx: int, states_BTD: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """Choose for one layer, integers [B, T]."""
        big_BT = uniform_hash(self.seed, memory, layer_idx) < self.share
        return torch.where(big_BT, int(Branch.BIG), int(Branch.SMALL)).expand(states_BTD.shape[:2]), memory


Maker = Callable[[str, DuoForCausalLM], Policy]


def _uniform(branch: Branch) -> Maker:
    def make(argument: str, model: DuoForCausalLM) -> Policy:
        if argument:
            raise UserError(f"policy all-{branch.name.lower()} takes no argument, got {argument!r}")
        return FixedRoutes(torch.full((model.config.num_hidden_layers,), int(branch)))

    return make


def _random(argument: str, model: DuoForCausalLM) -> Policy:
    share, _, seed = argument.partition(":")
    try:
        policy = RandomShare(float(share), int(seed or 0))
    except ValueError:
        raise UserError(f"policy random:{argument}: give a share and perhaps a seed, such as random:0.25:7") from None
    if not 0 <= policy.share <= 1:
        raise UserError(f"policy random:{argument}: the share must be in 0 .. 1")
    if not 0 <= policy.seed <= LARGEST_SEED:
        raise UserError(f"policy random:{argument}: the seed must be in 0 .. {LARGEST_SEED}")
    return policy


def _big_at(name: str, layers: Callable[[int, int], Sequence[int]]) -> Maker:
    def make(argument: str, model: DuoForCausalLM) -> Policy:
        num_layers = model.config.num_hidden_layers
        if not (argument.isdecimal() and len(argument) < 10 and int(argument) <= num_layers):
            raise UserError(f"policy {name}:{argument[:20]}: give the number of big layers, 0 .. {num_layers}")
        return FixedRoutes(pattern(layers(int(argument), num_layers), num_layers))

    return make


def _routes(argument: str, model: DuoForCausalLM) -> Policy:
    num_layers = model.config.num_hidden_layers
    if len(argument) != num_layers or set(argument) - set("012"):
        raise UserError(
            f"policy routes:{argument}: give {num_layers} digits, one per layer: "
            f"{', '.join(f'{branch.value} {branch.name.lower()}' for branch in Branch)}; got {len(argument)} characters"
        )
    return FixedRoutes(torch.tensor([int(digit) for digit in argument]))


def _router(argument: str, model: DuoForCausalLM) -> Policy:
    if not argument:  # as of an unset shell variable
        raise UserError("policy router: names no router; give the folder of one, as in router:FOLDER")
    return load_router(Path(argument).expanduser(), model.config)[0].to(model.device).policy()


POLICIES: dict[str, tuple[str, Maker]] = {
    "all-big": ("all-big", _uniform(Branch.BIG)),
    "all-small": ("all-small", _uniform(Branch.SMALL)),
    "all-skip": ("all-skip", _uniform(Branch.SKIP)),
    "random": ("random:SHARE[:SEED]", _random),
    "spread": ("spread:LAYERS", _big_at("spread", spread_layers)),
    "first": ("first:LAYERS", _big_at("first", lambda big, num_layers: range(big))),
    "last": ("last:LAYERS", _big_at("last", lambda big, num_layers: range(num_layers - big, num_layers))),
    "routes": ("routes:DIGITS", _routes),
    "router": ("router:FOLDER", _router),
}
"""Every named policy: how it is written, and the function that makes it from the text after the colon."""
