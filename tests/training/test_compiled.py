import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from duollm.training.compiled import compile_for_training, pays, plain_again, why_it_fails
from duollm.training.pretrain import prepare_for_training, random_routing_loss
from tiny import random_ids, tiny_model
from tiny_training import ALONE

SHARES = (0.25, 0.25, 0.5)


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(model, loss_fn, ids, step=0):
    loss, _ = loss_fn(ids, step, 0)
    loss.backward()
    found = {name: each.grad.clone() for name, each in model.named_parameters()}
    model.zero_grad()
    return loss.detach(), found


@pytest.mark.parametrize("scope", ["ffn", "layer"])
def test_compiled_training_is_the_plain_one_and_all_layers_share_the_code(scope):
    model, ids = tiny_model(num_hidden_layers=4, skip_scope=scope), random_ids(batch=2, tokens=8)
    prepare_for_training(model)
    plain = [gradients(model, random_routing_loss(model, SHARES, 0, ALONE), ids, step) for step in range(2)]
    counter = CompileCounterWithBackend("aot_eager")
    loss_fn = random_routing_loss(model, SHARES, 0, ALONE, compile_for_training(model, backend=counter))
    for step, (loss, wanted) in enumerate(plain):
        compiled_loss, found = gradients(model, loss_fn, ids, step)
        torch.testing.assert_close(compiled_loss, loss)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, wanted[name], atol=1e-6, rtol=1e-5, msg=name)
    assert counter.frame_count == 3, "two halves and the head"
    plain_again(model)
    assert torch.equal(gradients(model, random_routing_loss(model, SHARES, 0, ALONE), ids)[0], plain[0][0])


def test_what_fails_is_said_in_a_line_and_leaves_no_gradient():
    model, ids = tiny_model(), random_ids()
    prepare_for_training(model)

    def broken(graph, inputs):
        raise RuntimeError("no compiler\nlong story")

    loss_fn = random_routing_loss(model, SHARES, 0, ALONE, compile_for_training(model, backend=broken))
    state = torch.random.get_rng_state()
    said = why_it_fails(model, loss_fn, ids, torch.autocast("cpu", enabled=False))
    assert "no compiler" in said
    assert "\n" not in said
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(each.grad is None for each in model.parameters())


def test_short_trainings_are_not_worth_it():
    device = torch.device("cpu")
    assert not pays(1e12, device)[0]
    assert pays(1e16, device)[0]
    assert "30 s" in pays(1e12, device)[1]
