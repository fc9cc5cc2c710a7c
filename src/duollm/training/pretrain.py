"""Stage 1: train the duo with random routing (paper, section 3), compiled where that pays.

Shape letters: B batch, T tokens.
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from duollm.config import ModelConfig, PretrainConfig
from duollm.convert.saving import History, load_model, save_model
from duollm.data.packed import PackedData
from duollm.errors import UserError
from duollm.flops import training_flops
from duollm.models.attention import DuoRMSNorm
from duollm.models.branch import Branch
from duollm.models.configuration_duo import DuoConfig
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.routes.sampling import RandomSplit, derived_seed
from duollm.training.loop import Context, LossFn, Trainer
from duollm.training.next_token import Scorer, block_of_logits, next_token_loss, nll_and_gradient
from duollm.training.optimizer import TrainingPlan
from duollm.training.world import World

_SECONDS, _SAVED = 30, 0.25
"""What compiling takes, and the share of the training that it saves (docs/LOG.md)."""
_RATES = {"cpu": 50e9, "cuda": 1e14}
"""FLOP/s of training without it, per thread on CPUs. Assumed: measured ones would differ when a run continues."""


def pretrain(
    context: Context, model_config: ModelConfig, config: PretrainConfig, converted: Path | None = None
) -> None:
    """Train a duo and write `run/model`, a Hugging Face folder with the tokenizer.

    It starts from scratch, with the sizes of `model_config`, or from the duo in the folder `converted`.
    """
    data, world = context.data, context.world
    torch.manual_seed(context.seed)
    model = load_model(converted) if converted else DuoForCausalLM(duo_config(model_config, data))
    history = History.read(converted) if converted else History()
    nn.Module.to(model, world.device)  # transformers wraps its own so that mypy does not see a method
    if config.tokens:
        _train(context, model, config)
        history = history.then(_training_step(config, converted is None), data)
    if world.first:
        save_model(model, data.tokenizer, context.run / "model", history)
        (context.run / "resume" / "pretrain.pt").unlink(missing_ok=True)
    world.wait()


def _train(context: Context, model: DuoForCausalLM, config: PretrainConfig) -> None:
    prepare_for_training(model)
    length = context.data.sequence_length
    flops = training_flops(model.config, config.branch_shares, length, length)
    if config.freeze != "nothing":
        model.requires_grad_(False)
        for part in _left_to_train(model, config.freeze):
            part.requires_grad_(True)
        flops = flops * 2 // 3  # forward, and back to the states but not to the weights
    plan = TrainingPlan.of(config, config.tokens, length)
    trainer = Trainer.of("pretrain", plan, context, context.seed, flops / length)
    trainer.train(model, _loss(context, model, config, trainer))


def _left_to_train(model: DuoForCausalLM, freeze: str) -> Iterator[nn.Module]:
    """The parts that stay trainable: the small FFNs or the norms."""
    if freeze == "big":
        yield from (layer.mlp.small for layer in model.model.layers)
    else:
        yield from (part for part in model.modules() if isinstance(part, DuoRMSNorm | nn.LayerNorm))


def _loss(context: Context, model: DuoForCausalLM, config: PretrainConfig, trainer: Trainer) -> LossFn:
    """The loss of random routing, compiled if that is wanted or pays; a line says what was decided and why."""
    world, shares, start = context.world, config.branch_shares, time.perf_counter()
    wanted, why = bool(config.compile), "as pretrain.compile says"
    if config.compile == "auto":
        flops = trainer.flops_per_token * trainer.batch_at(0).size * trainer.plan.steps / world.size
        wanted, why = pays(flops, world.device)
    said = f"without torch.compile: {why}"
    loss_fn = random_routing_loss(model, shares, context.seed, world)
    if wanted:
        compiled_fn = random_routing_loss(model, shares, context.seed, world, compile_for_training(model))
        part_BT = world.share(torch.from_numpy(trainer.batch_at(0))).chunk(config.accumulate)[0]
        failed = why_it_fails(model, compiled_fn, part_BT, trainer.autocast())
        if failed:
            plain_again(model)
            said = f"without torch.compile, which fails: {failed}"
        else:
            loss_fn, said = compiled_fn, f"compiled in {time.perf_counter() - start:.0f} s: {why}"
    if world.first:
        print(f"pretrain: {said}", flush=True)
    return loss_fn


def duo_config(sizes: ModelConfig, data: PackedData) -> DuoConfig:
    """The model's configuration: the recipe's sizes, the tokenizer's vocabulary.

    Raises:
        UserError: sizes that do not fit together or do not hold the vocabulary.
    """
    given = sizes.duo_fields()
    given["vocab_size"] = given["vocab_size"] or data.vocab_size
    if given["vocab_size"] < data.vocab_size:
        raise UserError(
            f"the model's vocab_size ({given['vocab_size']}) is smaller than the tokenizer's vocabulary "
            f"({data.vocab_size}); leave it out or raise it"
        )
    try:
        return DuoConfig(**given, eos_token_id=data.end_of_text_id)
    except ValueError as error:
        raise UserError(f"model: {error}") from None


def prepare_for_training(model: DuoForCausalLM) -> None:
    """Choose the fastest attention for training here."""
    model.train()
    if model.device.type == "cpu":
        model.set_attn_implementation("eager")  # its backward is faster on CPUs (docs/LOG.md)


def random_routing_loss(
    model: DuoForCausalLM,
    branch_shares: tuple[float, float, float],
    seed: int,
    world: World,
    scorer: Scorer | None = None,
) -> LossFn:
    """Mean nll (nats) of the next token with an exact random share of the tokens on each branch.

    `scorer` is what `compile_for_training` returned.
    """
    generator = torch.Generator(world.device)

    def loss_fn(batch_BT: Tensor, step: int, part: int) -> tuple[Tensor, dict[str, float]]:
        generator.manual_seed(derived_seed(seed, step, part, world.rank))
        policy = RandomSplit(model.config.num_hidden_layers, batch_BT.numel(), branch_shares, generator)
        if scorer is None and batch_BT.numel() * model.config.vocab_size <= block_of_logits(batch_BT.device):
            return model(input_ids=batch_BT, labels=batch_BT, policy=policy, use_cache=False).loss, {}
        hidden_BTD = model.model(input_ids=batch_BT, policy=policy, use_cache=False).last_hidden_state
        return next_token_loss(model, hidden_BTD, batch_BT, scorer or nll_and_gradient), {}

    return loss_fn


def _training_step(config: PretrainConfig, from_scratch: bool) -> str:
    """What this training was, for the model's card."""
    shares = ", ".join(
        f"{share:.0%} {branch.name.lower()}" for branch, share in zip(Branch, config.branch_shares, strict=True)
    )
    begun = "Trained from scratch" if from_scratch else "Trained"
    frozen = {"big": ", only the small FFNs,", "all-but-norms": ", only the norms,"}.get(config.freeze, "")
    return f"{begun}{frozen} on {config.tokens:,} tokens with random routing (shares at every layer: {shares})"


def pays(flops: float, device: torch.device) -> tuple[bool, str]:
    """Whether compiling pays for a training of so many FLOPs, and why, in words."""
    rate = _RATES.get(device.type, _RATES["cpu"]) * (torch.get_num_threads() if device.type == "cpu" else 1)
    saved = _SAVED * flops / rate
    return saved > _SECONDS, f"compiling takes about {_SECONDS} s and would save about {saved:,.0f} s"


def compile_for_training(model: DuoForCausalLM, whole: bool | None = None, **options: Any) -> Scorer:
    """Compile the layers; return the compiled loss of the head.

    Args:
        whole: make all layers one graph; default: on a GPU, where starting small kernels one by one takes longer than
            they do. On a CPU it takes minutes and gains nothing, so the two halves of a layer are compiled, whose code
            all layers share; policies choose between the halves, so they stay ordinary Python.
        options: given to `torch.compile`.
    """
    settings = {"fullgraph": True, "dynamic": False, **options}
    if whole or (whole is None and model.device.type == "cuda"):
        model.model.forward = torch.compile(model.model.forward, **settings)
    else:
        for layer in model.model.layers:
            layer.attend, layer.branch = (torch.compile(half, **settings) for half in (layer.attend, layer.branch))
    scorer: Scorer = torch.compile(nll_and_gradient, **settings)
    return scorer


def plain_again(model: DuoForCausalLM) -> None:
    """Undo `compile_for_training`."""
    vars(model.model).pop("forward", None)
    for layer in model.model.layers:
        vars(layer).pop("attend", None)
        vars(layer).pop("branch", None)


def why_it_fails(
    model: DuoForCausalLM, loss_fn: LossFn, batch_BT: Tensor, autocast: AbstractContextManager[Any]
) -> str:
    """Try compiled code with a forward and a backward pass; return in a line why it fails, or nothing."""
    try:
        with torch.random.fork_rng(), autocast:
            loss, _ = loss_fn(batch_BT, 0, 0)
        loss.backward()
    except Exception as error:  # compilers fail in every way; what fails without one as well, the training will raise
        return first_line(error)
    finally:
        model.zero_grad(set_to_none=True)
    return ""


def first_line(error: Exception) -> str:
    """What an error says, in a line; of a compiler's error, what stopped the compiler."""
    error = getattr(error, "inner_exception", error)
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
