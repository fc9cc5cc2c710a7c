"""The engine equals one forward per route on every dense family: norms, positions, biases, windows, plain FFNs."""

import pytest
import torch

from dense import FAMILIES, VARIANTS, dense_model, left_padded
from duollm import Branch, DuoForCausalLM, RouteSpace, loss_table, search_oracle
from duollm.oracle.search import executed_nll
from naive_oracle import naive_committed, naive_table
from tiny import random_ids

variants = pytest.mark.parametrize("variant", [*FAMILIES, "llama-biases", "qwen3-sliding", "opt-no-biases"])
SPACE = RouteSpace(3, (Branch.SKIP, Branch.BIG))


def duo_of(variant):
    return DuoForCausalLM.from_dense(dense_model(VARIANTS[variant]), small_intermediate_size=6)


@variants
@pytest.mark.parametrize("context", ["shared", "reference"])
def test_losses_of_all_routes(variant, context):
    model, ids = duo_of(variant), random_ids(tokens=7)
    mask = left_padded(ids, 2)
    truth = naive_table(model, ids, SPACE, context, mask=mask)
    table = loss_table(model, ids, SPACE, context, attention_mask=mask)
    counted = (mask[:, :-1] & mask[:, 1:]).bool()
    torch.testing.assert_close(table[counted], truth[counted], atol=1e-4, rtol=0)


@variants
def test_committed_picks(variant):
    model, ids, space = duo_of(variant), random_ids(tokens=7), RouteSpace(3)
    found = search_oracle(model, ids, space, "committed", big_layers=[1])
    nll, _ = naive_committed(model, ids, space, [torch.as_tensor(space.ids_with(1))] * 6)
    torch.testing.assert_close(found.nll[0], nll, atol=1e-4, rtol=0)
    executed = executed_nll(model, ids, space, found.route_ids[0])
    torch.testing.assert_close(executed, found.nll[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("variant", "context", "longest"), [("opt", "shared", 33), ("llama-dynamic", "committed", 9)])
def test_texts_beyond_the_positions_are_refused(variant, context, longest):
    with pytest.raises(ValueError, match=f"at most {longest} tokens .* got {longest + 1}"):
        search_oracle(duo_of(variant), random_ids(tokens=longest + 1), RouteSpace(3), context, big_layers=[1])


def test_weights_in_bf16():
    model, ids, space = duo_of("llama").to(torch.bfloat16), random_ids(tokens=7), RouteSpace(3)
    truth = naive_table(model, ids, space, "shared").float()
    torch.testing.assert_close(loss_table(model, ids, space), truth, atol=0.2, rtol=0)
    found = search_oracle(model, ids, space, "shared", big_layers=[1])
    assert found.nll.dtype == torch.float32
    torch.testing.assert_close(found.nll[0], truth[..., space.ids_with(1)].amin(-1), atol=0.2, rtol=0)
