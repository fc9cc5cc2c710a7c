"""The exact oracle against the naive loop over transformers' Llama: one forward per route.

Shape letters: B sequences, T tokens.
"""

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from duollm.bench import Row, mean_seconds
from duollm.flops import shared_search
from duollm.machine import matmul_peak
from duollm.models.branch import Branch
from duollm.models.configuration_duo import DuoConfig
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.oracle.search import OracleResult, search_oracle
from duollm.routes.space import RouteSpace
from duollm.training.world import join_world

_NAIVE_ROUTES, _BUDGET = 8, 6
_TF32 = "shared, tf32"
_LAYERS, _DEPTHS, _BEAM_DEPTHS = 12, (6, 8, 10, 12), (12, 18, 24, 30)


class Load(NamedTuple):
    """What is searched: models of several widths; `batch` sequences of `length` tokens where many are run at once."""

    widths: tuple[int, ...]
    batch: int
    length: int


LOADS = {"cpu": Load((128,), 8, 128), "cuda": Load((128, 512), 64, 256)}
_LENGTH = 128  # where the growth is measured


def bench_search(seconds: float) -> Iterator[list[Row]]:
    """Yield tokens per second of every context against the naive loop; then how cost grows with L, exact and beam."""
    load = LOADS[join_world().device.type]
    for width in load.widths:
        yield from _against_naive(width, load, seconds)
    for layers in _DEPTHS:
        yield [_exact_of_depth(layers, seconds / 4)]
    for layers in _BEAM_DEPTHS:
        yield [_beam_of_depth(layers, seconds / 4)]


def _against_naive(width: int, load: Load, seconds: float) -> Iterator[list[Row]]:
    """Alternating: some routes by the naive loop, and a whole search."""
    model = trained_like(_config(width))
    tokens_BT = torch.randint(model.config.vocab_size, (load.batch, load.length), device=model.device)
    space = RouteSpace(_LAYERS)
    runs: dict[str, Callable[[], object]] = {
        "naive": _naive_loop(model, tokens_BT[:, :-1], tokens_BT[:, 1:], space),
        "shared": partial(search_oracle, model, tokens_BT[:1], space),
        "reference": partial(search_oracle, model, tokens_BT[:1], space, "reference"),
    }
    if model.device.type == "cuda":
        runs[_TF32] = partial(_in_tf32, model, tokens_BT[:1], space)
    times = {name: spent / (load.length - 1) for name, spent in mean_seconds(runs, seconds).items()}
    times["naive"] *= space.size / _NAIVE_ROUTES / load.batch
    needed = shared_search(model.config, load.length).flops / load.length

    def row(name: str, spent: float) -> Row:
        return {
            "search": name,
            "width": width,
            "L": _LAYERS,
            "tokens/s": 1 / spent,
            "ratio to naive": times["naive"] / spent,
            "needed GFLOP/s": needed / spent / 1e9,
            "share of matmul peak": needed / spent / matmul_peak("fp32") if name != _TF32 else "",
        }

    rows = [row(name, spent) for name, spent in times.items()]
    if _TF32 in runs:
        difference_KBT = _in_tf32(model, tokens_BT[:1], space).nll - search_oracle(model, tokens_BT[:1], space).nll
        rows[-1]["max error, nats"] = difference_KBT.abs().max().item()
    yield rows
    # Committed takes one token at a time, so it is run on several sequences side by side.
    committed = partial(search_oracle, model, tokens_BT, space, "committed", [_BUDGET])
    spent = mean_seconds({"": committed}, seconds)[""] / (load.length - 1) / load.batch
    yield [row(f"committed, {_BUDGET} big", spent)]


def _config(width: int) -> DuoConfig:
    """The quick recipe's shape at some width."""
    return DuoConfig(
        num_hidden_layers=_LAYERS,
        num_attention_heads=max(2, width // 64),
        hidden_size=width,
        intermediate_size=4 * width,
        small_intermediate_size=width // 4,
    )


def _in_tf32(model: DuoForCausalLM, ids_BT: Tensor, space: RouteSpace) -> OracleResult:
    """A search whose products keep 10 bits of the 23."""
    torch.set_float32_matmul_precision("high")
    try:
        return search_oracle(model, ids_BT, space)
    finally:
        torch.set_float32_matmul_precision("highest")


def _exact_of_depth(layers: int, seconds: float) -> Row:
    """Time per token of an exact search; theory: 2^L."""
    model = trained_like(DuoConfig(num_hidden_layers=layers))
    tokens_BT = torch.randint(4096, (4, _LENGTH), device=model.device)
    search = partial(search_oracle, model, tokens_BT, RouteSpace(layers))
    spent = mean_seconds({"": search}, seconds)[""] / tokens_BT[:, 1:].numel()
    return {"search": "shared", "L": layers, "tokens/s": 1 / spent, "ms per token / 2^L": 1e3 * spent / 2**layers}


def _beam_of_depth(layers: int, seconds: float) -> Row:
    """Time per token of a beam; theory: L, once the beam is full."""
    model = trained_like(DuoConfig(num_hidden_layers=layers))
    tokens_BT, big_layers = torch.randint(4096, (1, _LENGTH), device=model.device), [layers // 3]
    search = partial(search_oracle, model, tokens_BT, RouteSpace(layers), "reference", big_layers, method="beam")
    spent = mean_seconds({"": search}, seconds)[""] / (_LENGTH - 1)
    return {"search": "beam, reference", "L": layers, "tokens/s": 1 / spent, "ms per token / L": 1e3 * spent / layers}


def trained_like(config: DuoConfig) -> DuoForCausalLM:
    """A random model; pruning works on it about as well as on a trained one (docs/oracle.md)."""
    torch.manual_seed(0)
    model = DuoForCausalLM(config).eval()
    nn.Module.to(model, join_world().device)
    return model


def _naive_loop(model: DuoForCausalLM, inputs_BT: Tensor, labels_BT: Tensor, space: RouteSpace) -> Callable[[], object]:
    """Losses of a few random routes by ordinary Llama forwards, each layer's FFN exchanged per route."""
    llama, ffns = as_llama(model)
    draw = random.Random(0)

    @torch.inference_mode()
    def loop() -> None:
        ids = torch.tensor([draw.randrange(space.size) for _ in range(_NAIVE_ROUTES)])
        for route in space.decode(ids).tolist():
            for layer, choices, branch in zip(llama.model.layers, ffns, route, strict=True):
                layer.mlp = choices[Branch(branch)]
            logits = llama(input_ids=inputs_BT, use_cache=False).logits
            cross_entropy(logits.flatten(0, 1), labels_BT.flatten(), reduction="none")

    return loop


def as_llama(model: DuoForCausalLM) -> tuple[LlamaForCausalLM, list[dict[Branch, nn.Module]]]:
    """The same model as transformers' Llama, and its two FFNs per layer to choose from."""
    config = model.config
    sizes = {name: getattr(config, name) for name in LlamaConfig().to_dict() if hasattr(config, name)}
    for name in ("model_type", "architectures", "transformers_version"):
        sizes.pop(name, None)
    llama = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    small_config = LlamaConfig(**sizes | {"intermediate_size": config.small_intermediate_size})
    ffns: list[dict[Branch, nn.Module]] = []
    for layer in llama.model.layers:
        ffns.append({Branch.BIG: layer.mlp, Branch.SMALL: LlamaMLP(small_config)})
    _copy_weights(model, llama, ffns)
    for module in (llama, *(choices[Branch.SMALL] for choices in ffns)):
        nn.Module.to(module, model.device)
    return llama, ffns


def _copy_weights(model: DuoForCausalLM, llama: LlamaForCausalLM, ffns: list[dict[Branch, nn.Module]]) -> None:
    weights = model.state_dict()
    dense = {name.replace("mlp.big.", "mlp."): each for name, each in weights.items() if ".small." not in name}
    llama.load_state_dict(dense, assign=True)
    for index, choices in enumerate(ffns):
        prefix = f"model.layers.{index}.mlp.small."
        small = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        choices[Branch.SMALL].load_state_dict(small, assign=True)
