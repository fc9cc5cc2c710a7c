"""The same numbers on a GPU as on a CPU: forward, cache, training, a whole study. Skipped where there is no GPU."""

import copy
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForCausalLM

from duollm.bench.search import as_llama
from duollm.config import Recipe
from duollm.models.branch import Branch
from duollm.routers.calibration import ExactBudget
from duollm.routers.registry import make_router
from duollm.routes.space import RouteSpace
from duollm.study import run_study
from duollm.training.pretrain import compile_for_training, prepare_for_training, random_routing_loss
from duollm.training.world import World
from tiny import SIZES, random_ids, random_routes, tiny_model
from tiny_corpus import write_corpus

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHARES = (0.0, 0.5, 0.5)


def on_gpu(model):
    return nn.Module.to(copy.deepcopy(model), "cuda")


@pytest.mark.parametrize("scope", ["ffn", "layer"])
@pytest.mark.parametrize("execution", ["sparse", "reference"])
def test_logits_are_those_of_the_cpu(scope, execution):
    model, ids, routes = tiny_model(attention="sdpa", skip_scope=scope), random_ids(), random_routes()
    with torch.no_grad():
        wanted = model(ids, routes=routes, execution=execution).logits
        found = on_gpu(model)(ids.cuda(), routes=routes.cuda(), execution=execution).logits
    torch.testing.assert_close(found.cpu(), wanted, atol=1e-4, rtol=1e-4)


def test_all_big_is_transformers_llama():
    model, ids = on_gpu(tiny_model(attention="sdpa")), random_ids().cuda()
    llama, _ = as_llama(model)
    assert isinstance(llama, LlamaForCausalLM)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, llama(ids).logits, atol=1e-4, rtol=1e-4)


def test_a_cache_changes_nothing():
    model, ids, routes = on_gpu(tiny_model(attention="sdpa")), random_ids().cuda(), random_routes().cuda()
    with torch.no_grad():
        whole = model(ids, routes=routes).logits
        begun = model(ids[:, :4], routes=routes[:, :4], use_cache=True)
        ended = model(ids[:, 4:], routes=routes[:, 4:], past_key_values=begun.past_key_values).logits
    torch.testing.assert_close(torch.cat([begun.logits, ended], dim=1), whole, atol=1e-4, rtol=1e-4)


def test_generating_with_a_static_cache_is_generating_without():
    model, ids = on_gpu(tiny_model(attention="sdpa")), random_ids(batch=1).cuda()
    route = torch.tensor([Branch.SMALL, Branch.BIG, Branch.SMALL])
    plain = model.generate(ids, max_new_tokens=8, do_sample=False, routes=route)
    static = model.generate(ids, max_new_tokens=8, do_sample=False, routes=route, cache_implementation="static")
    assert torch.equal(plain, static)


@pytest.mark.parametrize("space", [RouteSpace(3), RouteSpace(3, groups=[[0, 1], [2]])], ids=["layers", "groups"])
def test_an_attached_router_is_moved_with_its_model(space):
    model, ids = tiny_model(), random_ids()
    router = make_router("linear", model.config, ["small", "big"], space).eval()
    model.attach(router.policy(ExactBudget(router, 1)))
    wanted = model(ids).routes
    assert torch.equal(model.cuda()(ids.cuda()).routes.cpu(), wanted)


def losses_and_gradients(model, ids, scorer=None):
    loss_fn = random_routing_loss(model, SHARES, 0, World(0, 1, ids.device), scorer)
    found = []
    for step in range(2):
        loss, _ = loss_fn(ids, step, 0)
        loss.backward()
        found.append(loss.detach())
    gradients = {name: each.grad for name, each in model.named_parameters()}
    return torch.stack(found), gradients


def test_compiled_training_is_the_plain_one():
    torch._dynamo.reset()
    plain, ids = on_gpu(tiny_model(num_hidden_layers=4, attention="sdpa")), random_ids(batch=2, tokens=8).cuda()
    compiled = copy.deepcopy(plain)
    for each in (plain, compiled):
        prepare_for_training(each)
    wanted, wanted_gradients = losses_and_gradients(plain, ids)
    found, gradients = losses_and_gradients(compiled, ids, compile_for_training(compiled))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted_gradients[name], atol=1e-4, rtol=1e-3, msg=name)


def test_random_routing_waits_for_nothing():
    model, ids = on_gpu(tiny_model(attention="sdpa")), random_ids(batch=2, tokens=8).cuda()
    prepare_for_training(model)
    loss_fn = random_routing_loss(model, SHARES, 0, World(0, 1, ids.device))
    loss_fn(ids, 0, 0)[0].backward()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            loss_fn(ids, 1, 0)[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    ours = [f"{each.filename}:{each.lineno}" for each in waits if "duollm" in each.filename]
    assert not ours


def test_a_study_runs_and_goes_on_where_it_stopped(tmp_path, no_measuring, monkeypatch):
    recipe = {
        "model": {key: SIZES[key] for key in ("hidden_size", "num_hidden_layers", "intermediate_size")},
        "data": {
            "domains": [str(write_corpus(tmp_path / "owls", documents=30))],
            "vocab_size": 300,
            "sequence_length": 16,
            "test_share": 0.3,
        },
        "pretrain": {"tokens": 2000, "batch_size": 8, "precision": "fp32", "checkpoint_every": 2},
        "oracle": {"documents": 3, "random_routes": 2, "big_layers": [1]},
        "router": {"kinds": ["linear"], "big_layers": [1, 2], "tokens": 500, "batch_size": 8, "precision": "fp32"},
        "ceiling": {"tokens": 500, "batch_size": 4},
    }
    study, command = Recipe.model_validate(recipe), ["duollm", "study"]
    run_study(study, tmp_path / "whole", command)
    stopped = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr("duollm.training.loop.Progress.step", stop_at(5))
        with pytest.raises(KeyboardInterrupt):
            run_study(study, stopped, command)
    run_study(study, stopped, command)
    whole, again = (load_file(folder / "model" / "model.safetensors") for folder in (tmp_path / "whole", stopped))
    for name, weight in whole.items():
        torch.testing.assert_close(again[name], weight, atol=1e-6, rtol=1e-5, msg=name)
    assert (stopped / "report.html").exists()


def stop_at(step):
    """A `Progress.step` that stops as Ctrl-C between two checkpoints does."""

    def shown(self, finished, measured):
        if finished == step:
            raise KeyboardInterrupt

    return shown
