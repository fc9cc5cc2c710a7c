"""Stage-1 training against transformers' dense Llama and a plain GPT of equal active FLOPs, compiled and not.

Shape letters: B batch, T tokens, D hidden, H heads, d width of a head.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM

from duollm.bench import Row, mean_seconds
from duollm.flops import training_flops
from duollm.machine import autocast, best_matmul, faster_precision
from duollm.models.configuration_duo import DuoConfig
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.training.optimizer import TrainingPlan, make_optimizer
from duollm.training.pretrain import compile_for_training, first_line, prepare_for_training, random_routing_loss
from duollm.training.world import join_world


class Load(NamedTuple):
    """What is trained: models of several widths on `batch` sequences of `length` tokens; some with eager attention."""

    widths: tuple[int, ...]
    batch: int
    length: int
    eager: bool


# What fills the device. Eager attention is what Llama's users on a CPU choose; on a GPU nobody does.
LOADS = {"cpu": Load((128, 256), 32, 128, eager=True), "cuda": Load((512, 1024), 32, 1024, eager=False)}
_SHARES = (0.0, 0.5, 0.5)
_LLAMA, _GPT, _EAGER, _COMPILED = "Llama", "GPT by hand", ", eager attention", ", compiled"
Loss = Callable[[Tensor, int], Tensor]


def bench_training(seconds: float) -> Iterator[list[Row]]:
    """Yield, width by width, steps of the quick recipe's model and of dense ones; same batch, optimiser, precision."""
    load = LOADS[join_world().device.type]
    for width in load.widths:
        yield _at_width(width, load, seconds)


def _at_width(width: int, load: Load, seconds: float) -> list[Row]:
    heads = max(1, width // 64)
    sizes: dict[str, Any] = {"hidden_size": width, "num_attention_heads": heads, "num_key_value_heads": heads}
    config = DuoConfig(**sizes, intermediate_size=4 * width, small_intermediate_size=width // 4)
    plan = TrainingPlan(steps=1, batch_size=load.batch, learning_rate=1e-3, precision=faster_precision())
    makers: dict[str, Callable[[], tuple[nn.Module, Loss]]] = {
        _LLAMA: lambda: _llama(config),
        _LLAMA + _EAGER: lambda: _llama(config, attn_implementation="eager"),
        _LLAMA + _COMPILED: lambda: _llama(config, compiled=True),
        _GPT: lambda: _gpt(config, load),
        _GPT + _EAGER: lambda: _gpt(config, load, fused=False),
        _GPT + _COMPILED: lambda: _gpt(config, load, compiled=True),
        _GPT + _EAGER + _COMPILED: lambda: _gpt(config, load, fused=False, compiled=True),
        "duo": lambda: _duo(config),
        "duo" + _COMPILED: lambda: _duo(config, compiled=True),
    }
    steps, skipped = {}, {}
    for name, make in makers.items():
        if _EAGER in name and not load.eager:
            continue
        steps[name] = _step(*make(), plan, load)
        try:
            steps[name]()
        except Exception as error:  # whatever a compiler does not like
            if not name.endswith(_COMPILED):
                raise
            del steps[name]
            skipped[name] = first_line(error)
    times, (peak, shape) = mean_seconds(steps, seconds), best_matmul(plan.precision)
    tokens = load.batch * load.length
    flops = training_flops(config, _SHARES, load.length, tokens)
    rows: list[Row] = [
        {
            "model": name,
            "width": width,
            "tokens/s": tokens / spent,
            "GFLOP/s": flops / spent / 1e9,
            "share of matmul peak": flops / spent / peak,
            "ratio to Llama": times[_LLAMA] / spent,
            "ratio to Llama, compiled": times[_LLAMA + _COMPILED] / spent if _LLAMA + _COMPILED in times else "",
        }
        for name, spent in times.items()
    ]
    measured = f"{plan.precision}, {' x '.join(map(str, shape))}"
    rows.append({"model": f"matmul peak ({measured})", "width": width, "GFLOP/s": peak / 1e9})
    return rows + [{"model": name, "width": width, "skipped": reason} for name, reason in skipped.items()]


def _llama(config: DuoConfig, compiled: bool = False, **options: Any) -> tuple[nn.Module, Loss]:
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    sizes: dict[str, Any] = {name: getattr(config, name) for name in (*names, "tie_word_embeddings")}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **options, intermediate_size=_active(config))).train()
    run = torch.compile(model) if compiled else model
    return model, lambda batch_BT, step: run(input_ids=batch_BT, labels=batch_BT, use_cache=False).loss


def _gpt(config: DuoConfig, load: Load, fused: bool = True, compiled: bool = False) -> tuple[nn.Module, Loss]:
    inner = _active(config) * 3 // 2  # two matrices where the gated FFN has three
    sizes = (config.vocab_size, config.hidden_size, config.num_hidden_layers, config.num_attention_heads)
    model = GPT(*sizes, inner, load.length, fused)
    run = torch.compile(model) if compiled else model
    return model, lambda batch_BT, step: run(batch_BT)


def _duo(config: DuoConfig, compiled: bool = False) -> tuple[nn.Module, Loss]:
    model = DuoForCausalLM(config)
    nn.Module.to(model, join_world().device)  # before it is prepared for its device
    prepare_for_training(model)
    scorer = compile_for_training(model) if compiled else None
    loss_fn = random_routing_loss(model, _SHARES, 0, join_world(), scorer)
    return model, lambda batch_BT, step: loss_fn(batch_BT, step, 0)[0]


def _active(config: DuoConfig) -> int:
    """The width of an FFN that takes as many FLOPs as a token takes here on average."""
    return (config.intermediate_size + config.small_intermediate_size) // 2


def _step(module: nn.Module, loss: Loss, plan: TrainingPlan, load: Load) -> Callable[[], None]:
    """One optimiser step as the training loop takes it."""
    device = join_world().device
    module.to(device)
    optimizer = make_optimizer(module, plan)
    batch_BT = torch.randint(4096, (load.batch, load.length), device=device)
    taken = 0

    def step() -> None:
        nonlocal taken
        with autocast(device, plan.precision):
            value = loss(batch_BT, taken)
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), plan.gradient_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value.item()
        taken += 1

    return step


class GPT(nn.Module):
    """Learned positions, blocks of attention and an FFN with GELU, a tied head.

    Args:
        inner: width of the FFNs.
        fused: whether attention is torch's fused kernel; otherwise three plain operations.
    """

    def __init__(self, vocab: int, width: int, layers: int, heads: int, inner: int, length: int, fused: bool) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(_Block(width, heads, inner, fused) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Return the mean nll of the next token."""
        hidden_BTD = self.tokens(ids_BT) + self.positions(torch.arange(ids_BT.shape[1], device=ids_BT.device))
        for block in self.blocks:
            hidden_BTD = block(hidden_BTD)
        logits_BTV = self.norm(hidden_BTD[:, :-1]) @ self.tokens.weight.T
        return cross_entropy(logits_BTV.flatten(0, 1).float(), ids_BT[:, 1:].flatten())


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, inner: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.norms = nn.ModuleList(nn.LayerNorm(width, bias=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, inner, bias=False), nn.Linear(inner, width, bias=False)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        hidden_BTD = hidden_BTD + self.attend(self.norms[0](hidden_BTD))
        return hidden_BTD + self.down(gelu(self.up(self.norms[1](hidden_BTD))))

    def attend(self, states_BTD: Tensor) -> Tensor:
        query, key, value = self.qkv(states_BTD).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.fused:
            mixed_BHTd = scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            scores_BHTT = query @ key.mT * query.shape[-1] ** -0.5
            later_TT = torch.ones(scores_BHTT.shape[-2:], dtype=torch.bool, device=query.device).triu(1)
            mixed_BHTd = scores_BHTT.masked_fill(later_TT, -torch.inf).softmax(-1) @ value
        out: Tensor = self.out(mixed_BHTd.transpose(1, 2).flatten(2))
        return out
