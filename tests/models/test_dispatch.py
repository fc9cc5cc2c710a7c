import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from duollm.models.branch import Branch
from duollm.models.dispatch import Dispatch
from tiny import random_ids, random_routes, tiny_model

choices = st.lists(st.sampled_from(Branch), min_size=1, max_size=20).map(lambda drawn: torch.tensor(drawn)[None])


@given(choices)
def test_counts_are_those_of_the_choice(choice_BT):
    counts = Dispatch.from_choice(choice_BT).counts
    assert counts == tuple(int((choice_BT == branch).sum()) for branch in Branch)


@given(choices)
def test_the_choice_can_be_read_back(choice_BT):
    assert torch.equal(Dispatch.from_choice(choice_BT).choice_N(), choice_BT.flatten())


@given(choices)
def test_groups_hold_each_branchs_tokens_and_go_back_in_place(choice_BT):
    states_ND = torch.arange(2.0 * choice_BT.numel()).view(-1, 2)
    dispatch = Dispatch.from_choice(choice_BT)
    groups = dispatch.group(states_ND)
    for branch, states in zip(Branch, groups, strict=True):
        assert torch.equal(states, states_ND[choice_BT.flatten() == branch])
    assert torch.equal(dispatch.ungroup(list(groups)), states_ND)


@given(choices)
def test_gradients_follow_the_tokens(choice_BT):
    scale_N1 = torch.arange(1.0, 1 + choice_BT.numel())[:, None]
    states_ND = torch.ones(choice_BT.numel(), 2, requires_grad=True)
    dispatch = Dispatch.from_choice(choice_BT)
    groups = [group * (1 + branch) for branch, group in zip(Branch, dispatch.group(states_ND), strict=True)]
    (dispatch.ungroup(groups) * scale_N1).sum().backward()
    assert torch.equal(states_ND.grad, (scale_N1 * (1 + choice_BT.flatten()[:, None])).expand(-1, 2))


def read_inside_a_transform(state):
    torch.stack([state]).tolist()
    return state.sum()


def test_transforms_of_functions_differentiate_mixed_routes():
    try:
        torch.func.grad(read_inside_a_transform)(torch.ones(1))
    except RuntimeError as error:
        pytest.skip(f"torch {torch.__version__} reads no values inside transforms: {error}")
    model, ids, routes = tiny_model(), random_ids(), random_routes()
    model(ids, labels=ids, routes=routes).loss.backward()
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    inputs = {"labels": ids, "routes": routes, "use_cache": False}
    found = torch.func.grad(lambda each: torch.func.functional_call(model, each, (ids,), inputs).loss)(weights)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(found[name], weight.grad)


@given(st.sampled_from(Branch), st.integers(1, 9))
def test_uniform_is_the_dispatch_of_equal_choices(branch, tokens):
    uniform = Dispatch.uniform(branch, tokens)
    assert uniform == Dispatch.from_choice(torch.full((1, tokens), int(branch)))
    assert torch.equal(uniform.choice_N(), torch.full((tokens,), int(branch)))


def test_an_order_says_who_comes_first():
    dispatch = Dispatch.from_order((1, 2, 1), torch.tensor([3, 0, 2, 1]))
    assert dispatch.choice_N().tolist() == [Branch.SMALL, Branch.BIG, Branch.SMALL, Branch.SKIP]
