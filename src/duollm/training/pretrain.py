"""Stage 1: train the duo with random routing (paper, section 3).

Shape letters: B batch, T tokens.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from duollm.config import ModelConfig, PretrainConfig
from duollm.convert.saving import History, load_model, save_model
from duollm.data.packed import PackedData
from duollm.errors import UserError
from duollm.flops import training_flops
from duollm.models.branch import Branch
from duollm.models.configuration_duo import DuoConfig
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.routes.sampling import RandomSplit, derived_seed
from duollm.training.loop import Context, LossFn, Trainer
from duollm.training.optimizer import TrainingPlan
from duollm.training.world import World


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
    prepare_for_training(model, config.compile)
    length = context.data.sequence_length
    flops = training_flops(model.config, config.branch_shares, length, length)
    if config.freeze == "big":
        model.requires_grad_(False)
        for layer in model.model.layers:
            layer.mlp.small.requires_grad_(True)
        flops = flops * 2 // 3  # forward, and back to the states but not to the weights
    plan = TrainingPlan.of(config, config.tokens, length)
    trainer = Trainer.of("pretrain", plan, context, context.seed, flops / length)
    trainer.train(model, random_routing_loss(model, config.branch_shares, context.seed, context.world))


def duo_config(sizes: ModelConfig, data: PackedData) -> DuoConfig:
    """The model's configuration: the recipe's sizes, the tokenizer's vocabulary.

    Raises:
        UserError: sizes that do not fit together or do not hold the vocabulary.
    """
    given = sizes.model_dump(exclude={"path", "dense"})
    given["vocab_size"] = given["vocab_size"] or data.vocab_size
    if given["vocab_size"] < data.vocab_size:
        raise UserError(
            f"model.vocab_size ({given['vocab_size']}) is smaller than the tokenizer's vocabulary "
            f"({data.vocab_size}); leave it out or raise it"
        )
    try:
        return DuoConfig(**given, eos_token_id=data.end_of_text_id)
    except ValueError as error:
        raise UserError(f"model: {error}") from None


def prepare_for_training(model: DuoForCausalLM, compile_blocks: bool) -> None:
    """Choose the fastest attention for training here, and compile the blocks if asked for."""
    model.train()
    if model.device.type == "cpu":
        model.set_attn_implementation("eager")  # its backward is faster on CPUs (docs/LOG.md)
    if compile_blocks:
        # Block by block: all layers share the compiled code, and policies stay ordinary Python.
        for layer in model.model.layers:
            for block in (layer.input_layernorm, layer.self_attn, layer.post_attention_layernorm, layer.mlp):
                block.compile()


def random_routing_loss(
    model: DuoForCausalLM, branch_shares: tuple[float, float, float], seed: int, world: World
) -> LossFn:
    """Mean nll (nats) of the next token with an exact random share of the tokens on each branch."""
    generator = torch.Generator(world.device)

    def loss_fn(batch_BT: Tensor, step: int, part: int) -> tuple[Tensor, dict[str, float]]:
        generator.manual_seed(derived_seed(seed, step, part, world.rank))
        policy = RandomSplit(model.config.num_hidden_layers, batch_BT.numel(), branch_shares, generator)
        return model(input_ids=batch_BT, labels=batch_BT, policy=policy, use_cache=False).loss, {}

    return loss_fn


def _training_step(config: PretrainConfig, from_scratch: bool) -> str:
    """What this training was, for the model's card."""
    shares = ", ".join(
        f"{share:.0%} {branch.name.lower()}" for branch, share in zip(Branch, config.branch_shares, strict=True)
    )
    begun = "Trained from scratch" if from_scratch else "Trained"
    frozen = ", only the small FFNs," if config.freeze == "big" else ""
    return f"{begun}{frozen} on {config.tokens:,} tokens with random routing (shares at every layer: {shares})"
