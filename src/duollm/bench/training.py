"""Stage-1 training against transformers' dense Llama of equal active FLOPs."""

import shutil
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from duollm.bench import Row
from duollm.bench.timing import alternate
from duollm.flops import training_flops
from duollm.machine import faster_precision, matmul_peak
from duollm.models.configuration_duo import DuoConfig
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.training.optimizer import TrainingPlan, make_optimizer
from duollm.training.pretrain import prepare_for_training, random_routing_loss
from duollm.training.world import join_world

_BATCH, _LENGTH, _SHARES = 32, 128, (0.0, 0.5, 0.5)
Loss = Callable[[Tensor, int], Tensor]


def bench_training(seconds: float) -> list[Row]:
    """Steps of the quick recipe's model, plain and compiled, and of a dense Llama; same batch, optimiser, precision."""
    config = DuoConfig()
    active = (config.intermediate_size + config.small_intermediate_size) // 2
    plan = TrainingPlan(steps=1, batch_size=_BATCH, learning_rate=1e-3, precision=faster_precision())
    steps = {
        "transformers Llama": _step(*_dense(config, active), plan),
        "duo": _step(*_duo(config, compile_blocks=False), plan),
    }
    if shutil.which("c++"):  # what torch.compile calls
        steps["duo, compiled"] = _step(*_duo(config, compile_blocks=True), plan)
    times = alternate(steps, seconds)
    tokens = _BATCH * _LENGTH
    flops = training_flops(config, _SHARES, _LENGTH, tokens)
    return [
        {
            "model": name,
            "precision": plan.precision,
            "tokens/s": tokens / spent,
            "GFLOP/s": flops / spent / 1e9,
            "share of matmul peak": flops / spent / matmul_peak(plan.precision),
            "ratio to Llama": times["transformers Llama"] / spent,
        }
        for name, spent in times.items()
    ]


def _dense(config: DuoConfig, intermediate_size: int) -> tuple[nn.Module, Loss]:
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    sizes = {name: getattr(config, name) for name in (*names, "tie_word_embeddings")}
    model = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=intermediate_size)).train()
    return model, lambda batch_BT, step: model(input_ids=batch_BT, labels=batch_BT, use_cache=False).loss


def _duo(config: DuoConfig, compile_blocks: bool) -> tuple[nn.Module, Loss]:
    model = DuoForCausalLM(config)
    prepare_for_training(model, compile_blocks)
    loss_fn = random_routing_loss(model, _SHARES, seed=0, world=join_world())
    return model, lambda batch_BT, step: loss_fn(batch_BT, step, 0)[0]


def _step(module: nn.Module, loss: Loss, plan: TrainingPlan) -> Callable[[], None]:
    """One optimiser step as the training loop takes it."""
    device = join_world().device
    module.to(device)
    optimizer = make_optimizer(module, plan)
    batch_BT = torch.randint(4096, (_BATCH, _LENGTH), device=device)
    taken = 0

    def step() -> None:
        nonlocal taken
        with torch.autocast(device.type, torch.bfloat16, enabled=plan.precision == "bf16"):
            value = loss(batch_BT, taken)
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), plan.gradient_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value.item()
        taken += 1

    return step
