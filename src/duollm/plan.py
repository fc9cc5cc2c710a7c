"""What a recipe will take: parameters, FLOPs, memory, steps, routes; without building the model."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from duollm.config import ModelConfig, Recipe, explain
from duollm.errors import UserError
from duollm.flops import (
    Parameters,
    SearchCost,
    count_parameters,
    naive_search,
    sequence_flops,
    shared_search,
    training_flops,
    training_steps,
)

Row = tuple[str, int, str, str]  # name, number, unit, remark

FLOAT32 = 4
BFLOAT16 = 2


class TrainingMemory(NamedTuple):
    """Bytes on one device while training: master weights stay float32 whatever the precision."""

    weights: int
    gradients: int
    moments: int
    """AdamW's two moments."""
    activations: int
    """Kept for the backward pass; an estimate: fused attention, every layer kept."""
    logits: int
    """Logits in the compute precision, their float32 log-probabilities, and the gradient of those."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


@dataclass(frozen=True)
class Training:
    """Stage 1 in numbers."""

    steps: int
    flops: int
    memory: TrainingMemory


@dataclass(frozen=True)
class Plan:
    """A recipe in numbers.

    `token_flops` are forward FLOPs per token, mean over a sequence, output head included, by route.
    `training` is None when the recipe names a trained model. `windows` is how many sequences the
    oracle searches at most, over all domains; the costs are for all of them.
    """

    recipe: Recipe
    parameters: Parameters
    token_flops: dict[str, int]
    training: Training | None
    router_steps: int
    windows: int
    naive: SearchCost
    shared: SearchCost


def plan(recipe: Recipe) -> Plan:
    """Count what `recipe` will take.

    Raises:
        UserError: the vocabulary size cannot be known without loading a tokenizer, or the recipe's
            model folder is not a duo model.
    """
    model = _sizes(recipe)
    length = recipe.data.sequence_length
    layers = model.num_hidden_layers
    budgets = {"all small": 0, f"{layers // 2} of {layers} big": layers // 2, "all big": layers}
    windows = len(recipe.data.domains) * recipe.oracle.documents * recipe.oracle.windows_per_document
    return Plan(
        recipe=recipe,
        parameters=count_parameters(model),
        token_flops={name: sequence_flops(model, big, length) // length for name, big in budgets.items()},
        training=None if recipe.model.path or not recipe.pretrain.tokens else _training(recipe, model),
        router_steps=training_steps(recipe.router.tokens, recipe.router.batch_size, length),
        windows=windows,
        naive=_times(naive_search(model, length), windows),
        shared=_times(shared_search(model, length), windows),
    )


def training_memory(recipe: Recipe, model: ModelConfig) -> TrainingMemory:
    """Estimate the bytes that stage 1 needs on one device, without sharding.

    Precision "auto" counts as float32, the larger.
    """
    compute = BFLOAT16 if recipe.pretrain.precision == "bf16" else FLOAT32
    parameters = count_parameters(model)
    tokens = recipe.pretrain.batch_size // recipe.pretrain.accumulate * recipe.data.sequence_length
    per_layer = _activation_bytes_per_layer(model, recipe.pretrain.branch_shares, compute)
    return TrainingMemory(
        weights=FLOAT32 * parameters.total,
        gradients=FLOAT32 * parameters.total,
        moments=2 * FLOAT32 * parameters.total,
        activations=tokens * model.num_hidden_layers * per_layer,
        logits=tokens * parameters.embedding // model.hidden_size * (compute + 2 * FLOAT32),
    )


def render(planned: Plan) -> str:
    """Lay the plan out as a table for people."""
    lines = []
    for heading, rows in _tables(planned):
        lines += ["", heading]
        lines += [f"  {name:<22}{si(number, unit):>14}   {remark}".rstrip() for name, number, unit, remark in rows]
    return "\n".join(lines[1:])


def si(number: int, unit: str = "") -> str:
    """Write a number for people: exact below 100,000, else three digits and a prefix (counts: B is billion)."""
    if number < 100_000:
        return f"{number:,} {unit}".rstrip()
    value, prefixes = Decimal(number), ["", *("kMGTPEZYRQ" if unit else "kMBT")]
    while value >= 1000 and len(prefixes) > 1:
        value, prefixes = value / 1000, prefixes[1:]
    digits = f"{value:.2e}" if value >= 1000 else f"{value:.{3 - len(str(int(value)))}f}"
    return f"{digits} {prefixes[0]}{unit}"


def _tables(planned: Plan) -> Iterator[tuple[str, list[Row]]]:
    recipe = planned.recipe
    parts = planned.parameters
    yield (
        f"{recipe.name}: parameters",
        [
            *((name, number, "", f"{number / parts.total:.1%}") for name, number in parts._asdict().items()),
            ("total", parts.total, "", ""),
        ],
    )
    yield (
        f"forward per token, mean over {recipe.data.sequence_length} tokens",
        [
            (name, flops, "FLOP", f"{flops / planned.token_flops['all big']:.2f} of all big")
            for name, flops in planned.token_flops.items()
        ],
    )
    if planned.training:
        yield from _training_tables(recipe, planned.training)
    yield _oracle_table(planned)
    kinds, budgets = recipe.router.kinds, recipe.router.big_layers
    for_all = si(recipe.router.tokens_for_all)
    each = f"for one budget, of {recipe.router.batch_size} sequences; {for_all} tokens, once, for all budgets"
    yield (
        "routers",
        [
            ("routers", len(kinds) * len(budgets), "", f"{', '.join(kinds)} at budgets {budgets}"),
            ("steps", planned.router_steps, "", each),
        ],
    )


def _training_tables(recipe: Recipe, training: Training) -> Iterator[tuple[str, list[Row]]]:
    pretrain = recipe.pretrain
    step_tokens = pretrain.batch_size * recipe.data.sequence_length
    yield (
        "training",
        [
            ("tokens", pretrain.tokens, "", ""),
            ("steps", training.steps, "", f"of {pretrain.batch_size} sequences, {si(step_tokens)} tokens"),
            ("compute", training.flops, "FLOP", "three times the forward pass"),
        ],
    )
    micro_batch = pretrain.batch_size // pretrain.accumulate
    precision = "fp32 (auto: the larger)" if pretrain.precision == "auto" else pretrain.precision
    remarks = {
        "activations": f"estimate: {micro_batch} sequences in {precision}, fused attention",
        "logits": f"{micro_batch} sequences",
    }
    yield (
        "training memory on one device, not sharded",
        [
            *((name, number, "B", remarks.get(name, "")) for name, number in training.memory._asdict().items()),
            ("total", training.memory.total, "B", ""),
        ],
    )


def _oracle_table(planned: Plan) -> tuple[str, list[Row]]:
    naive, shared, windows = planned.naive, planned.shared, planned.windows
    sharing = Decimal(naive.flops) / shared.flops
    tokens = windows * planned.recipe.data.sequence_length
    search = planned.recipe.oracle.search
    other = "" if search == "exact" else f" ({search} tries a part of them)"
    return (
        f"oracle, every small/big route{other}",
        [
            ("routes", naive.head // windows, "", "per token"),
            ("tokens", tokens, "", f"in {windows:,} windows"),
            ("layers, shared prefixes", shared.attention // windows, "", "evaluations of a layer per token"),
            ("layers, route by route", naive.attention // windows, "", "evaluations of a layer per token"),
            ("compute, shared prefixes", shared.flops, "FLOP", f"{sharing:.1f} times less"),
            ("compute, route by route", naive.flops, "FLOP", ""),
        ],
    )


def _training(recipe: Recipe, model: ModelConfig) -> Training:
    settings, length = recipe.pretrain, recipe.data.sequence_length
    return Training(
        steps=training_steps(settings.tokens, settings.batch_size, length),
        flops=training_flops(model, settings.branch_shares, length, settings.tokens),
        memory=training_memory(recipe, model),
    )


def _times(cost: SearchCost, windows: int) -> SearchCost:
    return SearchCost(*(number * windows for number in cost))


def _activation_bytes_per_layer(model: ModelConfig, shares: tuple[float, float, float], compute: int) -> int:
    """Bytes per token that autograd keeps for one layer's backward pass."""
    hidden = model.hidden_size
    keys_and_values = 2 * model.num_key_value_heads * hidden // model.num_attention_heads
    norms = 2 * (2 * FLOAT32 + compute) * hidden  # input and normalised in float32, output
    attention = compute * (2 * hidden + keys_and_values)  # queries, keys, values, mixed values
    inner = round(shares[1] * model.small_intermediate_size + shares[2] * model.intermediate_size)
    ffn = compute * (hidden + 4 * inner)  # input; gate, its activation, up, their product
    return norms + attention + ffn


def _sizes(recipe: Recipe) -> ModelConfig:
    """Return the model's sizes with the vocabulary filled in."""
    model, data = recipe.model, recipe.data
    if model.path:
        return _sizes_of_folder(Path(model.path))
    if model.dense:
        return _sizes_of_dense(model, Path(model.dense))
    if model.vocab_size is None and data.tokenizer is not None:
        raise UserError(
            f"plan does not load tokenizers: add --model.vocab_size N, the vocabulary size of {data.tokenizer}"
        )
    return model.model_copy(update={"vocab_size": model.vocab_size or data.vocab_size})


def _sizes_of_dense(model: ModelConfig, folder: Path) -> ModelConfig:
    """The checkpoint's sizes if it is a folder; plan asks no hub, so for an id those of the recipe."""
    if not folder.is_dir():
        if model.vocab_size is None:
            raise UserError(f"plan does not download {folder}: give its folder, or its sizes under model")
        return model
    saved = _read_config(folder, "model.dense")
    sizes = {name: saved[name] for name in ModelConfig.model_fields if saved.get(name) is not None}
    return _checked(
        folder,
        "model.dense",
        {
            "intermediate_size": saved.get("ffn_dim"),  # OPT's name of it
            "num_key_value_heads": saved.get("num_attention_heads"),
            **sizes,
            "small_intermediate_size": model.small_intermediate_size,
            "skip_scope": model.skip_scope,
        },
    )


def _checked(folder: Path, key: str, sizes: dict[str, Any]) -> ModelConfig:
    try:
        return ModelConfig(**sizes)
    except ValidationError as error:
        raise UserError(f"{key}: config.json of {folder}: {': '.join(filter(None, explain(error)))}") from None


def _read_config(folder: Path, key: str) -> dict[str, Any]:
    try:
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        saved = None
    if not isinstance(saved, dict):
        raise UserError(f"{key}: {folder} holds no readable config.json; give a model folder")
    return saved


def _sizes_of_folder(folder: Path) -> ModelConfig:
    saved = _read_config(folder, "model.path")
    if saved.get("model_type") != "duo":
        raise UserError(f"model.path: {folder} is a {saved.get('model_type')!r} model, not 'duo'; convert it first")
    return _checked(folder, "model.path", {name: saved[name] for name in ModelConfig.model_fields if name in saved})
