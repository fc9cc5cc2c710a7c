"""What the section `oracle` of a recipe asks for, and whether a model and a machine can do it."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from duollm.config import ModelConfig, OracleConfig
from duollm.errors import UserError
from duollm.flops import count_parameters
from duollm.machine import device_memory_bytes
from duollm.models.branch import Branch
from duollm.models.configuration_duo import DuoConfig
from duollm.oracle.budgets import Budget, Cells, Exactly, OnAverage, parse_budget, parse_budgets
from duollm.oracle.tree import default_bytes, row_bytes
from duollm.routes.space import LARGEST_LISTED, RouteSpace, parse_branches, searchable_groups

SHARD_WINDOWS = 8
"""The fewest windows that are searched and written together, unless there are no more."""

_LARGEST_TABLE = 2**16
"""The largest space in which the exact search keeps the losses of every pattern. Above it, patterns are drawn."""


@dataclass(frozen=True)
class SearchPlan:
    """What the section `oracle` of a recipe asks for, for a model of this depth and windows of this length."""

    config: OracleConfig
    num_layers: int
    sequence_length: int

    @cached_property
    def space(self) -> RouteSpace:
        """The routes that are searched.

        Raises:
            UserError: groups and fixed layers do not name every layer once.
        """
        config = self.config
        fixed = {layer: Branch[name.upper()] for name, layers in config.fixed.items() for layer in layers}
        groups = config.groups
        if groups == "auto":
            groups = searchable_groups(self.num_layers - len(fixed), len(config.branches))
        try:
            return RouteSpace(self.num_layers, parse_branches(config.branches), groups, fixed)
        except ValueError as error:
            raise UserError(f"groups or fixed: {error}") from None

    @property
    def contexts(self) -> list[str]:
        """The contexts to search. The exact search in context shared is added, because it serves the controls."""
        always = ("shared",) if self.config.search == "exact" else ()
        return list(dict.fromkeys((*always, *self.config.contexts)))

    @property
    def tables_all(self) -> bool:
        """Whether the search gives the losses of all fixed patterns. If not, some patterns are drawn."""
        return self.config.search == "exact" and self.space.size <= _LARGEST_TABLE

    def big_layers(self, context: str) -> list[int]:
        """Numbers of big layers to search for. Except in context committed, the fewest and the most are added."""
        config, possible = self.config, self.space.big_layers
        if context == "committed" and config.committed_big_layers is not None:
            return config.committed_big_layers
        default = possible if config.search == "exact" else self.space.focus_budgets
        wanted = default if config.big_layers is None else config.big_layers
        return list(wanted) if context == "committed" else sorted({possible[0], possible[-1], *wanted})

    def budgets(self, context: str) -> list[Budget]:
        """All budgets to search for."""
        exact: list[Budget] = [Exactly(big) for big in self.big_layers(context)]
        more = [parse_budget(text, self.sequence_length - 1) for text in self.config.more_budgets]
        return exact + [each for each in more if not (context == "committed" and isinstance(each, OnAverage))]

    @property
    def facts(self) -> dict[str, Any]:
        """What the manifest of a store says about the search, beside the fingerprints of model and data."""
        kept = ("contexts", "search", "more_budgets", "random_routes", "resampled_labels", "counted_share", "units")
        return {
            **self.space.facts,
            "context": self.config.contexts[0],
            "big_layers": self.big_layers("shared"),
            "sequence_length": self.sequence_length,
            **{name: getattr(self.config, name) for name in kept},
        }


def check_settings(config: OracleConfig, sizes: DuoConfig | ModelConfig, sequence_length: int) -> None:
    """Refuse settings that cannot be searched, before the search.

    Raises:
        UserError: there are too many routes to try all, a budget is impossible, layers are in no group or in several,
            or the memory does not suffice; the message begins with a setting.
    """
    plan = SearchPlan(config, sizes.num_hidden_layers, sequence_length)
    space = plan.space
    if len(space.big_layers) == 1:
        raise UserError("branches: some layer that is not fixed must be able to take big, else there are no budgets")
    if config.search == "exact" and space.size > LARGEST_LISTED:
        raise UserError(
            f"search: exact would try {space.base}^{len(space.group_layers)} routes per token; "
            "set it to beam, local or sampled, or let layers vary in groups"
        )
    draws = config.resampled_labels and config.search == "exact"
    if not draws and (config.labels_from or config.labels_temperature != 1):
        raise UserError(
            "labels_from and labels_temperature are about drawn labels, and there are none with resampled_labels "
            f"{config.resampled_labels} and search {config.search}; set them to 1 and exact, or leave these out"
        )
    if config.units and config.search != "exact":
        raise UserError(f"units needs every route, and search {config.search} tries some; leave it out or set exact")
    table = 12 * space.size * sequence_length / 2**30
    if config.units and table > _memory_gib(plan, sizes):
        raise UserError(
            f"units keeps the losses of {space.size:,} routes, {table:.3g} GiB for each window; raise memory_gib, "
            "or leave units out"
        )
    extra = sorted(set(plan.big_layers("committed")) - set(plan.big_layers("shared")))
    if extra and "committed" in config.contexts:
        raise UserError(f"committed_big_layers holds {extra[0]}, which big_layers lacks; add it there")
    cells = Cells.of_model(space, sizes)
    try:
        for context in plan.contexts:
            cells.wanted(parse_budgets(None, plan.budgets(context), space), range(sequence_length - 1))
    except ValueError as error:
        raise UserError(f"big_layers or more_budgets: {error}") from None
    one_route = _route_gib(plan, sizes)
    if config.memory_gib is not None and one_route > config.memory_gib:
        raise UserError(
            f"memory_gib: one route of a window of {sequence_length} tokens takes {one_route:.2g} GiB, "
            f"got {config.memory_gib}; raise it or leave it out, or use shorter windows"
        )


def _memory_gib(plan: SearchPlan, sizes: DuoConfig | ModelConfig) -> float:
    """The memory that the hidden states of a search may take on this machine."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return plan.config.memory_gib or max(default_bytes(device) / 2**30, _route_gib(plan, sizes))


def _route_gib(plan: SearchPlan, sizes: DuoConfig | ModelConfig) -> float:
    """The memory that one route of a window takes, the least that a block may hold."""
    return (plan.sequence_length - 1) * row_bytes(sizes, plan.space) / 2**30


def check_memory(config: OracleConfig, sizes: DuoConfig, sequence_length: int) -> None:
    """Refuse a search that this machine's memory, or its GPU's, cannot hold.

    Raises:
        UserError: the message begins with a setting.
    """
    plan = SearchPlan(config, sizes.num_hidden_layers, sequence_length)
    parts = {"the model": 4 * count_parameters(sizes).total / 2**30, "hidden states": _memory_gib(plan, sizes)}
    if plan.tables_all:
        windows = max(SHARD_WINDOWS, config.windows_per_document)
        labels = 2 * config.resampled_labels + (config.resampled_labels > 0)  # of one window at a time
        tokens = (windows + labels) * sequence_length * config.counted_share
        parts["the losses of all patterns"] = 4 * plan.space.size * tokens / 2**30
    needed, available = sum(parts.values()), device_memory_bytes() / 2**30
    if needed > available:
        listed = ", ".join(f"{size:.2g} for {name}" for name, size in parts.items())
        raise UserError(
            f"memory_gib: the search would take {needed:.3g} GiB ({listed}), this machine has {available:.3g}; "
            "lower it, counted_share or the number of groups"
        )
