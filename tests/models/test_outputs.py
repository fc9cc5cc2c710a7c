"""Outputs as tuples, pickled, and gathered from several devices."""

import pickle

import pytest
import torch
from torch.nn.parallel import scatter_gather

from duollm.routers.policies import RandomShare
from tiny import random_ids, random_routes, tiny_model

GIVEN = {
    "all big": {},
    "a route": {"routes": torch.tensor([1, 0, 2])},
    "routes": {"routes": random_routes()},
    "a router": {"policy": RandomShare(0.5)},
    "soft": {"policy": lambda layer, states, memory: (torch.full((*states.shape[:2], 3), 1 / 3), None)},
}


@pytest.fixture(params=GIVEN.values(), ids=GIVEN.keys())
def given(request):
    return request.param


@pytest.mark.parametrize("everywhere", [False, True], ids=["argument", "configuration"])
def test_a_tuple_holds_what_the_output_holds(given, everywhere):
    model, ids = tiny_model(), random_ids()
    output = model(ids, labels=ids, use_cache=False, **given)
    model.config.return_dict = not everywhere
    loss, logits, choices = model(
        ids, labels=ids, use_cache=False, **given, **({} if everywhere else {"return_dict": False})
    )
    assert torch.equal(loss, output.loss)
    assert torch.equal(logits, output.logits)
    assert all(map(torch.equal, choices, output.choices))
    states, _ = model.model(ids, use_cache=False, return_dict=False)
    assert torch.equal(states, model.model(ids, use_cache=False, return_dict=True).last_hidden_state)


def test_choices_are_tensors_of_batch_and_time(given):
    for choice in tiny_model()(random_ids(), **given).choices:
        assert choice.shape[:2] == (2, 9)


def test_outputs_can_be_pickled(given):
    output = tiny_model()(random_ids(), use_cache=False, **given)
    assert torch.equal(pickle.loads(pickle.dumps(output)).routes, output.routes)


class OnOneDevice:
    """What torch's gather does with tensors of several GPUs."""

    @staticmethod
    def apply(device, dim, *tensors):
        return torch.cat([tensor.view(1) if tensor.ndim == 0 else tensor for tensor in tensors], dim)


def test_data_parallel_gathers_the_outputs_of_its_replicas(monkeypatch, given):
    model, ids = tiny_model(), random_ids()
    monkeypatch.setattr(scatter_gather, "Gather", OnOneDevice)
    rows = [{"input_ids": ids[row : row + 1], "labels": ids[row : row + 1]} for row in range(2)]
    if given.get("routes") is not None and given["routes"].ndim == 3:
        rows = [row | {"routes": given["routes"][at : at + 1]} for at, row in enumerate(rows)]
    else:
        rows = [row | given for row in rows]
    gathered = scatter_gather.gather([model(**row) for row in rows], 0)
    whole = model(ids, **given)
    torch.testing.assert_close(gathered.logits, whole.logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(gathered.routes, whole.routes)
    assert gathered.loss.shape == (2,)
