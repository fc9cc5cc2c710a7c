import pytest
import torch
from torch.nn.functional import cross_entropy

from duollm.models.branch import Branch
from duollm.routers.marginal import RandomGates, RouterGates, centred, marginal_gains
from duollm.routers.registry import make_router
from duollm.routes.space import RouteSpace
from tiny import random_ids, tiny_model

SKIP, SMALL, BIG = Branch
SETS = {"two": (SMALL, BIG), "skip": (SKIP, BIG), "three": (SKIP, SMALL, BIG)}


def gates_of(ids, branches=(SMALL, BIG), seed=0):
    return RandomGates(RouteSpace(3, branches), ids, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("branches", SETS.values(), ids=SETS)
def test_gates_are_hard_and_of_the_branches(branches):
    model, ids = tiny_model(), random_ids(40, 9)
    gates = gates_of(ids, branches)
    model(ids, policy=gates)
    drawn_LBT3 = torch.stack(gates.gates_JBT3)
    assert drawn_LBT3.shape == (3, 40, 9, 3)
    assert torch.equal(drawn_LBT3.sum(-1), torch.ones(3, 40, 9))
    assert {Branch(each) for each in drawn_LBT3.argmax(-1).unique().tolist()} == set(branches)
    share_B = drawn_LBT3[..., BIG].mean((0, 2))
    assert torch.corrcoef(torch.stack([share_B, gates.big_B1[:, 0]]))[0, 1] > 0.8
    assert share_B.std() > 0.2, "all budgets occur"


def test_gains_are_finite_differences_of_the_nll():
    """The naive truth, one gate at a time."""
    model, ids = tiny_model().double().requires_grad_(False), random_ids(2, 4)
    gates = gates_of(ids)
    gain_LBTC, mean_nll = marginal_gains(model, ids, gates)
    assert gain_LBTC.shape == (3, 2, 3, 2)
    weights = [gate.detach() for gate in gates.gates_JBT3]

    def nll():
        logits = model(ids, policy=lambda layer, states, memory: (weights[layer], memory)).logits
        return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()

    assert mean_nll == pytest.approx(nll() / 6)
    step = 2e-3  # the norms compute in float32
    for layer, row, token, branch in ((0, 0, 0, 1), (0, 1, 2, 0), (1, 0, 1, 1), (2, 1, 0, 0), (2, 0, 2, 1)):
        gate = weights[layer][row, token]
        column = (SMALL, BIG)[branch]
        gate[column] += step
        more = nll()
        gate[column] -= 2 * step
        less = nll()
        gate[column] += step
        assert gain_LBTC[layer, row, token, branch].item() == pytest.approx(
            (less - more) / (2 * step), rel=2e-2, abs=1e-4
        )


def test_draws_are_repeatable():
    model, ids = tiny_model(), random_ids()
    first, second, other = (marginal_gains(model, ids, gates_of(ids, seed=seed))[0] for seed in (3, 3, 4))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_centred_values_have_no_mean():
    assert torch.equal(centred(torch.tensor([[1.0, 3.0], [2.0, 2.0]])), torch.tensor([[-1.0, 1.0], [0.0, 0.0]]))


def test_the_router_decides_at_the_price_of_each_sequences_share(monkeypatch):
    model, ids = tiny_model(), random_ids(6, 40)
    router = make_router("gains", model.config, ["small", "big"])
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(router.weight_LCD, generator=generator)
    monkeypatch.setattr("duollm.routers.marginal.explored_share", lambda progress: 0.0)
    gates = RouterGates(router, ids, generator)
    gates.measure(model, ids, progress=1.0)
    big_LBT = torch.stack(gates.gates_JBT3)[..., Branch.BIG]
    spent_B = big_LBT.mean((0, 2)).detach()
    assert spent_B.numpy() == pytest.approx(gates.big_B1.flatten().numpy(), abs=0.15)
    assert torch.stack([spent_B, gates.big_B1.flatten()]).corrcoef()[0, 1] > 0.95


def test_off_policy_gains_are_those_of_all_big_and_the_choices_stay_in_the_memory(monkeypatch):
    """The naive truth: the gates of a forward in which every layer is big."""
    model, ids = tiny_model(), random_ids(2, 6)
    router = make_router("sequential-off-policy", model.config, ["small", "big"])
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(router.weight_LCD, generator=generator)
    remembered, remember = [], router.remember

    def note(layer, choice, memory):
        remembered.append(choice)
        return remember(layer, choice, memory)

    monkeypatch.setattr(router, "remember", note)
    gates = RouterGates(router, ids, generator, off_policy=True)
    gain_LBTC, nll = gates.measure(model, ids, progress=1.0)
    big = [torch.tensor([0.0, 0.0, 1.0]).repeat(2, 6, 1).requires_grad_() for _ in range(3)]
    logits = model(ids, policy=lambda layer, states, memory: (big[layer], memory)).logits
    total = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    slopes_LBT3 = torch.stack(torch.autograd.grad(total, big))
    assert nll == pytest.approx(total.item() / 10)
    torch.testing.assert_close(gain_LBTC, -slopes_LBT3[:, :, :-1, 1:])
    assert set(torch.stack(remembered[-3:]).argmax(-1).unique().tolist()) == {int(SMALL), int(BIG)}
