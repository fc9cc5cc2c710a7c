"""The search on a GPU: the losses of the CPU, and hardly a wait for the device."""

import warnings

import pytest
import torch

from duollm import Branch, DuoConfig, DuoForCausalLM, RouteSpace, search_oracle
from duollm.oracle.approximate import Local
from duollm.oracle.budgets import Exactly
from duollm.oracle.noise import DrawnLabels
from duollm.oracle.reductions import LeafTable, RandomRoutes
from duollm.oracle.run import rounding_bias
from naive_oracle import GROUPED, tiny_model, tiny_tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SPACES = {"layers": RouteSpace(5, tuple(Branch)), **GROUPED}
TOKENS = 65


@pytest.mark.parametrize("scope", ["ffn", "layer"])
@pytest.mark.parametrize("context", ["shared", "reference", "committed"])
@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_losses_are_those_of_the_cpu(closer_bound, space, context, scope):
    model, tokens = tiny_model(space.num_layers, scope), tiny_tokens(2, 9)
    right = search_oracle(model, tokens, space, context)
    found = search_oracle(model.cuda(), tokens.cuda(), space, context)
    torch.testing.assert_close(found.nll.cpu(), right.nll, atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", ["beam", "local", "sampled"])
@pytest.mark.parametrize("context", ["shared", "reference"])
def test_approximate_methods_find_losses_of_their_routes(method, context):
    space, model, tokens = SPACES["layers"], tiny_model(5).cuda(), tiny_tokens(2, 9).cuda()
    exact = search_oracle(model, tokens, space, context, [2])
    found = search_oracle(model, tokens, space, context, [2], method=method)
    assert (found.nll >= exact.nll - 1e-4).all()
    assert (found.nll - exact.nll).mean() < exact.nll.mean()
    bettered = search_oracle(model, tokens, space, context, [2], method=Local(found.route_ids.cpu()))
    assert (bettered.nll <= found.nll + 1e-5).all()


def _waits(space: RouteSpace, context: str, **settings) -> int:
    """How often a search waits for the GPU, once everything is loaded."""
    model = DuoForCausalLM(DuoConfig(num_hidden_layers=space.num_layers, vocab_size=512)).eval().cuda()
    tokens = torch.randint(512, (1, TOKENS), device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    counted = torch.ones(TOKENS - 1, dtype=torch.bool, device="cuda")
    counted[::2] = False

    def search() -> None:
        kept = [DrawnLabels(), RandomRoutes(10), LeafTable(counted, space.size)]
        search_oracle(model, tokens, space, context, [2, 4], reductions=kept, generator=generator, **settings)

    search()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            search()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [f"{each.filename}:{each.lineno}" for each in said if "synchronizing CUDA" in str(each.message)]
    print(f"{context}, {space.size} routes: {len(waits)} waits", *sorted(waits), sep="\n")
    return len(waits)


@pytest.mark.parametrize("context", ["shared", "reference"])
def test_waits_do_not_grow_with_depth_or_routes(context):
    """A search chooses twice per block of leaves which of them run the full head; all else is known before."""
    few = _waits(RouteSpace(6), context)
    assert _waits(RouteSpace(10), context) == few
    assert _waits(RouteSpace(12, groups=6), context) == few
    interleaved = RouteSpace(12, groups=[[layer, layer + 6] for layer in range(6)])
    assert _waits(interleaved, context) == few
    one_route = 2**21  # bytes: no two routes fit a block, so that there are many
    assert _waits(RouteSpace(6), context, memory_bytes=one_route) > few + 6


def test_products_in_tf32_say_their_bias():
    model, tokens = DuoForCausalLM(DuoConfig(num_hidden_layers=5)).eval().cuda(), tiny_tokens(1, 33).cuda()
    torch.set_float32_matmul_precision("high")
    try:
        bias_K = rounding_bias(model, tokens[0], SPACES["layers"], [Exactly(2), Exactly(3)], "exact")
    finally:
        torch.set_float32_matmul_precision("highest")
    assert 0 < bias_K.abs().max() < 0.05
