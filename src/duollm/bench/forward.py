"""Forward passes at every share of big against transformers' dense Llama; and what a router adds.

Shape letters: B sequences, T tokens, L layers.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from duollm.bench import Row
from duollm.bench.search import as_llama, trained_like
from duollm.flops import ffn_parameters, token_flops
from duollm.machine import Precision
from duollm.measure.timing import durations
from duollm.models.branch import Branch
from duollm.models.compat import CACHE
from duollm.models.configuration_duo import DuoConfig
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.models.policy import FixedRoutes
from duollm.routers.base import Router
from duollm.routers.registry import make_router
from duollm.routes.sampling import pattern, spread_layers
from duollm.training.world import join_world

# A small vocabulary: only the last token's logits are computed, and the head reads little beside the layers.
_SIZES: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "small_intermediate_size": 256,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
}
_ROUTER_SIZES = _SIZES | {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "small_intermediate_size": 128,
    "num_attention_heads": 8,
}
_GPU_SIZES: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "small_intermediate_size": 512,
    "num_attention_heads": 32,
}
_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
_BATCHES, _PREFILL, _PROMPT, _STEPS = (1, 8), 512, 128, 8
_ROUTERS = ("linear", "sequential")  # the paper's, and the one that computes most
_DENSE, _WITH_ROUTER, _GIVEN_ROUTES = "transformers Llama", "router", "its routes given"


def bench_forward(seconds: float, precision: Precision = "fp32") -> Iterator[list[Row]]:
    """Prefill and decoding at batch 1 and 8, each share of big beside the dense Llama; then a router at width 512.

    On a GPU the model is larger, and decoding is measured in CUDA graphs too.
    """
    on_gpu = join_world().device.type == "cuda"
    model = _random_model(_SIZES | _GPU_SIZES if on_gpu else _SIZES, precision)
    llama, _ = as_llama(model)
    for work in _works(model):
        yield _against_dense(work, model, llama, seconds)
    for batch in _BATCHES if on_gpu else ():
        yield _in_graphs(model, llama, batch, seconds)
    model = _random_model(_ROUTER_SIZES, precision)
    works = _works(model)
    for kind in _ROUTERS:
        router = _random_router(kind, model)
        for work in works:
            yield [_with_router(work, model, kind, router, seconds)]


def predict(cost: float, all_small: tuple[float, float], all_big: tuple[float, float]) -> float:
    """Seconds for `cost`, on the line through two measured points (cost, seconds)."""
    (small_cost, small_time), (big_cost, big_time) = all_small, all_big
    return small_time + (cost - small_cost) * (big_time - small_time) / (big_cost - small_cost)


def weights_read(config: DuoConfig, routes_BTL: Tensor) -> float:
    """Mean number of FFN weights that a decoding step reads: a layer's branch counts once if any sequence takes it."""
    read = 0.0
    for branch, parameters in zip(Branch, ffn_parameters(config), strict=True):
        read += parameters * (routes_BTL == branch).any(0).sum().item()
    return read / routes_BTL.shape[1]


def ffn_flops(config: DuoConfig, routes_BTL: Tensor) -> float:
    """FLOPs of all tokens' FFNs; everything else costs the same under every route."""
    return sum(
        2.0 * parameters * (routes_BTL == branch).sum().item()
        for branch, parameters in zip(Branch, ffn_parameters(config), strict=True)
    )


def draw_routes(shape: tuple[int, int, int], share: float, generator: torch.Generator) -> Tensor:
    """Random routes [B, T, L] with `share` big: of the tokens at each layer, or of each token's layers if T is few."""
    batch, tokens, layers = shape
    across = 0 if tokens > layers else 1
    rank = torch.rand(batch * tokens, layers, generator=generator).argsort(across)
    big = rank < round(share * rank.shape[across])
    return torch.where(big, int(Branch.BIG), int(Branch.SMALL)).view(shape)


@dataclass
class _Work:
    """Some tokens to send through a model: a prompt at once, or token by token on the cache of a prompt."""

    ids_BT: Tensor
    phase: str = "decode"

    @property
    def decoding(self) -> bool:
        return self.phase != "prefill"

    @property
    def passes(self) -> int:
        return self.ids_BT.shape[1] if self.decoding else 1

    def row(self, name: str, seconds: float) -> Row:
        """What a model took for the work, in milliseconds per forward pass."""
        facts: Row = {"phase": self.phase, "batch": len(self.ids_BT), "model": name}
        return facts | {"ms": 1e3 * seconds / self.passes, "tokens/s": self.ids_BT.numel() / seconds}

    def compared(self, times: Mapping[str, float]) -> list[Row]:
        """Rows of models that were measured in turns, all big and the dense Llama among them."""
        return [
            self.row(name, spent)
            | {"speed vs all big": times["100% big"] / spent, "speed vs Llama": times[_DENSE] / spent}
            for name, spent in times.items()
        ]

    @torch.inference_mode()
    def run(self, model: Any, cache: DynamicCache | None, routes_BTL: Tensor | None = None, **given: Any) -> list[Any]:
        """Do the work once and return the outputs; a cache is cut back to the prompt afterwards."""
        outputs, width = [], 1 if self.decoding else self.ids_BT.shape[1]
        for start in range(0, self.ids_BT.shape[1], width):
            here = slice(start, start + width)
            routes = {} if routes_BTL is None else {"routes": routes_BTL[:, here]}
            ids = self.ids_BT[:, here]
            outputs.append(model(input_ids=ids, logits_to_keep=1, **{CACHE: cache}, **routes, **given))
        if cache is not None:
            cache.crop(-self.ids_BT.shape[1])
        return outputs

    @torch.inference_mode()
    def cache(self, model: DuoForCausalLM) -> DynamicCache | None:
        """The cache of a prompt, if there is one."""
        if not self.decoding:
            return None
        cache = DynamicCache(config=model.config)
        model(input_ids=_random_ids(model, len(self.ids_BT), _PROMPT), cache=cache)
        return cache


def _works(model: DuoForCausalLM) -> list[_Work]:
    works = [_Work(_random_ids(model, batch, _PREFILL), "prefill") for batch in _BATCHES]
    return works + [_Work(_random_ids(model, batch, _STEPS)) for batch in _BATCHES]


def _medians(runs: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    return {name: median(each) for name, each in durations(runs, seconds).items()}


def _against_dense(work: _Work, model: DuoForCausalLM, llama: nn.Module, seconds: float) -> list[Row]:
    """One row for each share, one for the dense model, all measured in turns."""
    shape, generator = (*work.ids_BT.shape, model.config.num_hidden_layers), torch.Generator().manual_seed(0)
    routes = {f"{share:.0%} big": draw_routes(shape, share, generator).to(model.device) for share in _SHARES}
    cache = work.cache(model)
    runs = {name: partial(work.run, model, cache, each) for name, each in routes.items()}
    times = _medians({**runs, _DENSE: partial(work.run, llama, cache)}, seconds)
    count = weights_read if work.decoding else ffn_flops
    costs = {name: count(model.config, each) for name, each in routes.items()}
    ends = [(costs[name], times[name]) for name in ("0% big", "100% big")]
    rows = work.compared(times)
    for row, (name, cost) in zip(rows, costs.items(), strict=False):
        predicted = predict(cost, *ends)
        row |= {"predicted ms": 1e3 * predicted / work.passes, "ratio to predicted": times[name] / predicted}
    return rows


def _in_graphs(model: DuoForCausalLM, llama: nn.Module, batch: int, seconds: float, **options: Any) -> list[Row]:
    """Decoding with a static cache, compiled into one CUDA graph: no kernel is started alone.

    All tokens take one pattern, for a graph cannot change its shapes.

    Args:
        options: in place of those for `torch.compile`.
    """
    layers = model.config.num_hidden_layers
    runs = {_DENSE: _compiled_step(llama, batch, options)}
    for share in _SHARES:
        policy = FixedRoutes(pattern(spread_layers(round(share * layers), layers), layers))
        runs[f"{share:.0%} big"] = _compiled_step(model, batch, options, policy=policy)
    work = _Work(_random_ids(model, batch, _STEPS), "decode in CUDA graphs")
    return work.compared(_medians(runs, seconds))


def _compiled_step(model: nn.Module, batch: int, options: dict[str, Any], **given: Any) -> Callable[[], object]:
    """Some compiled steps of decoding in an empty static cache, one after the other."""
    compiled = torch.compile(model, **(options or {"mode": "reduce-overhead", "fullgraph": True}))
    cache = StaticCache(config=cast(Any, model.config), max_cache_len=_PROMPT)
    ids_B1 = torch.zeros(batch, 1, dtype=torch.long, device=next(model.parameters()).device)
    step: dict[str, Any] = {"input_ids": ids_B1, "past_key_values": cache, "use_cache": True, "position_ids": ids_B1}

    @torch.inference_mode()
    def run() -> None:
        cache.reset()
        for _ in range(_STEPS):
            compiled(**step, **given)

    with torch.inference_mode():
        model(**step, **given)  # the cache takes its memory now: what a graph allocates, the next one overwrites
    return run


def _with_router(work: _Work, model: DuoForCausalLM, kind: str, router: Router, seconds: float) -> Row:
    """The forward that a router steers against the same forward with its routes given."""
    cache = work.cache(model)
    chosen = torch.cat([output.routes for output in work.run(model, cache, policy=router)], dim=1)
    runs = {
        _WITH_ROUTER: partial(work.run, model, cache, policy=router),
        _GIVEN_ROUTES: partial(work.run, model, cache, chosen),
    }
    times = _medians(runs, seconds)
    big = (chosen == Branch.BIG).float().mean().item()
    forward = token_flops(model.config, round(big * model.config.num_hidden_layers), _PREFILL)
    name = f"{kind} router, width {model.config.hidden_size}, {big:.0%} big"
    return work.row(name, times[_WITH_ROUTER]) | {
        "router's share of time": 1 - times[_GIVEN_ROUTES] / times[_WITH_ROUTER],
        "its share of FLOPs": router.flops_per_token() / forward,
    }


def _random_ids(model: DuoForCausalLM, batch: int, tokens: int) -> Tensor:
    return torch.randint(model.config.vocab_size, (batch, tokens), device=model.device)


def _random_model(sizes: dict[str, Any], precision: Precision) -> DuoForCausalLM:
    model = trained_like(DuoConfig(**sizes))
    return model if precision == "fp32" else model.bfloat16()


def _random_router(kind: str, model: DuoForCausalLM) -> Router:
    """A router of random weights."""
    router = make_router(kind, model.config, ["small", "big"])
    for weight in router.parameters():
        nn.init.normal_(weight)
    return router.eval().to(model.device)
