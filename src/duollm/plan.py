"""Plans a recipe without building the model: parameters, FLOPs, memory, steps, routes."""

import json
from collections.abc import Iterator, Sequence
from decimal import Decimal
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
from huggingface_hub.errors import StrictDataclassError

from duollm.checks import check_recipe, completed, given_config
from duollm.config import Recipe
from duollm.errors import UserError
from duollm.flops import count_parameters, naive_search, sequence_flops, shared_search, training_flops, training_steps
from duollm.models.configuration_duo import DuoConfig
from duollm.oracle.approximate import Beam
from duollm.oracle.plan import SearchPlan
from duollm.recipe_files import recipe_of

FLOAT32, BFLOAT16 = 4, 2  # bytes
_NEAR = 0.25
"""A planned time that is off by less is near the measured one."""


class Row(NamedTuple):
    """One number of a plan."""

    table: str
    label: str
    value: int
    unit: str = ""
    remark: str = ""


class Devices(NamedTuple):
    """What a recipe is to run on.

    Attributes:
        peak: FLOP/s of matrix products on one device, in the precision of the training.
        used: share of the peak that training and search reach.
    """

    number: int
    peak: float
    used: float

    def seconds(self, flops: int) -> int:
        """Return how long the devices together take."""
        return round(Decimal(flops) / Decimal(self.number * self.peak * self.used))


def plan(recipe: Recipe, devices: Devices | None = None) -> list[Row]:
    """Count what `recipe` will take and return the rows, table by table.

    Args:
        devices: adds the time on them, and shares the batch among them; default: memory on one device, no time.

    Raises:
        UserError: the configuration of the recipe's model is missing, or is neither a duo's nor of a known family;
            or a study would refuse the recipe.
    """
    config, length = planned_config(recipe), recipe.data.sequence_length
    recipe = completed(recipe, config)
    check_recipe(recipe, config)
    parts, layers = count_parameters(config), config.num_hidden_layers
    rows = [Row("parameters", name, each, "", f"{each / parts.total:.1%}") for name, each in parts._asdict().items()]
    rows += [Row("parameters", "total", parts.total)]
    budgets = {"all small": 0, f"{layers // 2} of {layers} big": layers // 2, "all big": layers}
    flops = {name: sequence_flops(config, big, length) // length for name, big in budgets.items()}
    table = f"forward per token, mean over {length} tokens"
    rows += [
        Row(table, name, each, "FLOP", f"{each / flops['all big']:.2f} of all big") for name, each in flops.items()
    ]
    if not recipe.model.path and recipe.pretrain.tokens:
        rows += [*_training(recipe, config), *_training_memory(recipe, config, devices.number if devices else 1)]
    rows += [*_oracle(recipe, config), *_routers(recipe)]
    if devices:
        machine = f"time on {devices.number} x {si(round(devices.peak), 'FLOP/s')}, {devices.used:.0%} of it used"
        rows += [
            Row(machine, row.table.split(",")[0] + row.label.removeprefix("compute"), devices.seconds(row.value), "s")
            for row in rows
            if row.label.startswith("compute")
        ]
    return rows


def check_against(run: Path, devices: Devices) -> list[Row]:
    """Compare the planned time of a run's pretraining on `devices` with the time that it took.

    Raises:
        UserError: the folder is no run, or no step of its pretraining was logged.
    """
    recipe, given = recipe_of(run), run / "metrics.jsonl"
    try:
        records = [json.loads(line) for line in given.read_text(encoding="utf-8").splitlines()]
        logged = [
            (each["step"], each["tokens_per_second"], each["flops"], each["peak_share"])
            for each in records
            if each["training"] == "pretrain"
        ]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{given}: not what a training writes ({error})") from None
    if not logged:
        raise UserError(f"{given}: holds no step of a pretraining; give a run that trained its model")
    step_ends, rates_N, flops_N, shares_N = np.array(logged).T
    tokens_N = np.diff(step_ends, prepend=0) * recipe.pretrain.batch_size * recipe.data.sequence_length
    seconds = float((tokens_N / rates_N).sum())
    shapes = recipe.pretrain.branch_shares, recipe.data.sequence_length, int(tokens_N.sum())
    planned = devices.seconds(training_flops(planned_config(recipe), *shapes))
    off = planned / seconds - 1
    share = float(np.median(shares_N))
    advice = f"; it used {share:.0%} of its peak: plan with --mfu {share:.2f}" if abs(off) > _NEAR else ""
    table = f"training of {run}, {si(shapes[-1])} tokens"
    return [
        Row(table, "planned", planned, "s", f"{off:+.0%}{advice}"),
        Row(table, "measured", round(seconds), "s", f"median {si(round(float(np.median(flops_N))), 'FLOP/s')}"),
    ]


def planned_config(recipe: Recipe) -> DuoConfig:
    """Return the configuration of the recipe's model: of a saved duo, of a dense checkpoint, or with the given sizes.

    Nothing is downloaded. For a dense checkpoint on the hub, the recipe must give the sizes.
    """
    model, data = recipe.model, recipe.data
    vocab_size = model.vocab_size or (None if data.tokenizer or model.dense else data.vocab_size)
    config = given_config(recipe) if model.path or (model.dense and Path(model.dense).is_dir()) else None
    if config:
        return config
    if not vocab_size:
        raise UserError(f"model.vocab_size: a plan loads nothing; give that of {data.tokenizer or model.dense}")
    try:
        return DuoConfig(**model.duo_fields() | {"vocab_size": vocab_size})
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise UserError(f"model: {' '.join(str(error).split())}") from None


def render(rows: Sequence[Row]) -> str:
    """Return the plan as tables of text."""
    lines = []
    for table, of_table in groupby(rows, lambda row: row.table):
        lines += ["", table]
        lines += [f"  {row.label:<22}{si(row.value, row.unit):>14}   {row.remark}".rstrip() for row in of_table]
    return "\n".join(lines[1:])


def si(number: int, unit: str = "") -> str:
    """Write a number for people: exact below 100,000, else three digits and a prefix (counts: B is billion)."""
    if unit == "s" and 120 <= number < 360_000:
        return f"{number / 60:.0f} min" if number < 7200 else f"{number / 3600:.1f} h"
    if number < 100_000:
        return f"{number:,} {unit}".rstrip()
    if unit == "s":  # a long time
        return f"{number / 3600:,.0f} h" if number < 10**12 else f"{Decimal(number) / 31_557_600:.2e} years"
    value, prefixes = Decimal(number), ["", *("kMGTPEZYRQ" if unit else "kMBT")]
    while value >= 1000 and len(prefixes) > 1:
        value, prefixes = value / 1000, prefixes[1:]
    digits = f"{value:.2e}" if value >= 1000 else f"{value:.{3 - len(str(int(value)))}f}"
    return f"{digits} {prefixes[0]}{unit}"


def _training(recipe: Recipe, config: DuoConfig) -> Iterator[Row]:
    pretrain, length = recipe.pretrain, recipe.data.sequence_length
    of_each = f"of {pretrain.batch_size} sequences, {si(pretrain.batch_size * length)} tokens"
    flops = training_flops(config, pretrain.branch_shares, length, pretrain.tokens)
    yield Row("training", "tokens", pretrain.tokens)
    yield Row("training", "steps", training_steps(pretrain.tokens, pretrain.batch_size, length), "", of_each)
    yield Row("training", "compute", flops, "FLOP", "three times the forward pass")


def _training_memory(recipe: Recipe, config: DuoConfig, devices: int) -> Iterator[Row]:
    """Bytes on each device; master weights stay float32 whatever the precision, and "auto" counts as the larger."""
    pretrain, weights = recipe.pretrain, FLOAT32 * count_parameters(config).total
    compute = BFLOAT16 if pretrain.precision == "bf16" else FLOAT32
    precision = "fp32 (auto: the larger)" if pretrain.precision == "auto" else pretrain.precision
    sequences, left = divmod(pretrain.batch_size, pretrain.accumulate * devices)
    if left:
        raise UserError(
            f"pretrain.batch_size ({pretrain.batch_size}) must be divisible by {devices} devices x "
            f"pretrain.accumulate ({pretrain.accumulate})"
        )
    tokens = sequences * recipe.data.sequence_length
    layers = config.num_hidden_layers * _activation_bytes(config, pretrain.branch_shares, compute)
    # Logits in the compute precision, their float32 log-probabilities, and the gradient of those.
    logits = config.vocab_size * (compute + 2 * FLOAT32)
    sizes = {"weights": weights, "gradients": weights, "moments": 2 * weights}
    sizes |= {"activations": tokens * layers, "logits": tokens * logits}
    remarks = {"activations": f"estimate: {sequences} sequences in {precision}, fused attention"}
    remarks |= {"moments": "AdamW's two", "logits": f"{sequences} sequences"}
    for name, size in [*sizes.items(), ("total", sum(sizes.values()))]:
        yield Row(
            f"training memory on {'each' if devices > 1 else 'one'} device, not sharded",
            name,
            size,
            "B",
            remarks.get(name, ""),
        )


def _activation_bytes(config: DuoConfig, shares: tuple[float, float, float], compute: int) -> int:
    """Bytes per token that autograd keeps for one layer's backward pass."""
    hidden, (heads, key_value_heads, width) = config.hidden_size, config.attention_shape
    norm = (1 if config.norm == "layer" else 2) * FLOAT32 + compute  # input, normalised if RMS, in float32; output
    attention = compute * 2 * (heads + key_value_heads) * width  # queries, keys, values, mixed values
    head_norms = norm * (heads + key_value_heads) * width if config.qk_norm else 0
    inner = round(shares[1] * config.small_intermediate_size + shares[2] * config.intermediate_size)
    ffn = compute * (hidden + (4 if config.gated_ffn else 2) * inner)  # input; gate, its activation, up, their product
    return 2 * norm * hidden + attention + head_norms + ffn


def _oracle(recipe: Recipe, config: DuoConfig) -> Iterator[Row]:
    oracle, length = recipe.oracle, recipe.data.sequence_length
    windows = len(recipe.data.domains) * oracle.documents * oracle.windows_per_document
    space = SearchPlan(oracle, config.num_hidden_layers, length).space
    naive = naive_search(config, length, space)
    table = f"oracle, {oracle.search} search of the routes of {'/'.join(oracle.branches)}, in one context"
    yield Row(table, "routes", naive.head, "", "per token")
    yield Row(table, "tokens", windows * length, "", f"in {windows:,} windows")
    if oracle.search in ("exact", "beam"):
        width = Beam.width if oracle.search == "beam" else None
        search, how = shared_search(config, length, space, width), f"beam of {width}" if width else "shared prefixes"
        less = f"{Decimal(naive.flops) / search.flops:.2g} times less"
        yield Row(table, f"layers, {how}", search.attention, "", "evaluations of a layer per token")
        yield Row(table, f"compute, {how}", windows * search.flops, "FLOP", less)
    yield Row(table, "layers, route by route", naive.attention, "", "evaluations of a layer per token")
    yield Row(table, "compute, route by route", windows * naive.flops, "FLOP")


def _routers(recipe: Recipe) -> Iterator[Row]:
    router = recipe.router
    trained = f"{', '.join(router.kinds)} at budgets {router.big_layers}"
    yield Row("routers", "routers", len(router.kinds) * len(router.big_layers), "", trained)
    steps = training_steps(router.tokens, router.batch_size, recipe.data.sequence_length)
    for_all = f"{si(router.tokens_for_all)} tokens, once, for all budgets"
    yield Row("routers", "steps", steps, "", f"for one budget, of {router.batch_size} sequences; {for_all}")
