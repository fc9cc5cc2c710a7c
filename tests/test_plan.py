import json
import subprocess
import sys

import pytest

from duollm.config import Recipe, load_recipe
from duollm.errors import UserError
from duollm.flops import count_parameters, naive_search, sequence_flops, shared_search, training_flops
from duollm.plan import plan, render, si

SMALL = {
    "model.vocab_size": "1000",
    "model.hidden_size": "32",
    "model.num_hidden_layers": "4",
    "model.intermediate_size": "128",
    "model.small_intermediate_size": "8",
    "data.domains": "[prose, code]",
    "data.sequence_length": "16",
    "pretrain.tokens": "1000",
    "pretrain.batch_size": "8",
    "pretrain.accumulate": "2",
    "pretrain.precision": "fp32",
    "oracle.documents": "3",
    "oracle.windows_per_document": "5",
    "router.tokens": "300",
    "router.batch_size": "4",
    "router.big_layers": "[1, 2]",
}


def small(**changes):
    return load_recipe(None, SMALL | {key.replace("__", "."): value for key, value in changes.items()})


def test_parameters_are_those_of_the_model():
    assert plan(small()).parameters == count_parameters(small().model)


def test_the_vocabulary_is_that_of_the_tokenizer_to_train():
    recipe = small(model__vocab_size="null", data__vocab_size="300")
    assert plan(recipe).parameters.embedding == 300 * 32


def test_flops_per_token_are_the_mean_over_a_sequence():
    model = small().model
    expected = {name: sequence_flops(model, big, 16) // 16 for name, big in (("all small", 0), ("all big", 4))}
    planned = plan(small()).token_flops
    assert {name: planned[name] for name in expected} == expected
    assert planned["2 of 4 big"] * 2 == planned["all small"] + planned["all big"]


def test_steps_come_nearest_to_the_tokens():
    planned = plan(small())
    assert planned.training.steps == 8  # 7.8: 1000 tokens in steps of 128
    assert planned.router_steps == 5  # 4.7: 300 tokens in steps of 64
    assert plan(small(router__tokens="1")).router_steps == 1


def test_training_compute_follows_the_branch_shares():
    recipe = small(pretrain__branch_shares="[0, 0, 1]")
    assert plan(recipe).training.flops == training_flops(recipe.model, (0, 0, 1), 16, 1000)
    assert plan(recipe).training.flops > plan(small()).training.flops


def test_weights_gradients_and_moments_take_sixteen_bytes_per_parameter():
    planned = plan(small(pretrain__precision="bf16"))
    memory = planned.training.memory
    assert memory.weights == memory.gradients == 4 * planned.parameters.total
    assert memory.weights + memory.gradients + memory.moments == 16 * planned.parameters.total
    assert memory.total == sum(memory)


@pytest.mark.parametrize(("precision", "bytes_per_logit"), [("fp32", 12), ("bf16", 10), ("auto", 12)])
def test_logits_are_those_of_one_micro_batch(precision, bytes_per_logit):
    memory = plan(small(pretrain__precision=precision)).training.memory
    micro_batch_tokens = 8 // 2 * 16
    assert memory.logits == micro_batch_tokens * 1000 * bytes_per_logit


def test_oracle_cost_is_that_of_all_windows():
    planned = plan(small())
    assert planned.windows == 2 * 3 * 5
    assert planned.shared.flops == 30 * shared_search(small().model, 16).flops
    assert planned.naive.attention == 30 * naive_search(small().model, 16).attention == 30 * 4 * 2**4


def test_activation_estimate_is_near_what_autograd_keeps():
    torch = pytest.importorskip("torch")
    from duollm import DuoConfig, DuoForCausalLM

    recipe = small(pretrain__accumulate="1")
    sizes = recipe.model.model_dump(exclude={"path", "dense", "rope_theta"})
    model = DuoForCausalLM(DuoConfig(**sizes))
    model.set_attn_implementation("sdpa")
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        choices = torch.randint(1, 3, (8, 16, 4))
        hidden = model.model(
            input_ids=torch.randint(0, 1000, (8, 16)), policy=lambda layer, *_: (choices[..., layer], None)
        )
    assert hidden.last_hidden_state.requires_grad
    measured = sum(storage.nbytes() for storage in kept.values())
    assert plan(recipe).training.memory.activations == pytest.approx(measured, rel=0.15)


def test_a_trained_model_is_read_from_its_folder_and_needs_no_training(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "duo", "vocab_size": 77, "hidden_size": 10, "num_attention_heads": 2, "extra": 1})
    )
    planned = plan(small(model__path=str(tmp_path)))
    assert planned.parameters.embedding == 770
    assert planned.training is None
    assert "training memory" not in render(planned)


@pytest.mark.parametrize("config", [None, "{", '{"model_type": "llama"}'])
def test_a_folder_without_a_duo_model_is_refused(tmp_path, config):
    if config:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match=r"model\.path"):
        plan(small(model__path=str(tmp_path)))


def test_an_unknown_vocabulary_asks_for_its_size():
    with pytest.raises(UserError, match=r"--model\.vocab_size"):
        plan(small(model__vocab_size="null", data__tokenizer="somewhere"))


def test_the_table_shows_the_numbers():
    text = render(plan(Recipe()))
    for shown in ("3.82 M", "2.36 M", "24.9 TFLOP", "4,095", "49,152", "732"):
        assert shown in text


def test_a_network_too_deep_to_search_is_still_planned():
    assert "e+" in render(plan(small(model__num_hidden_layers="2000", router__big_layers="[1]")))


@pytest.mark.parametrize(
    ("number", "unit", "text"),
    [
        (0, "", "0"),
        (99_999, "", "99,999"),
        (100_000, "", "100 k"),
        (1_399_234_560, "", "1.40 B"),
        (12_345_678, "B", "12.3 MB"),
        (999_999, "FLOP", "1000 kFLOP"),
        (10**36, "FLOP", "1.00e+6 QFLOP"),
    ],
)
def test_numbers_are_short(number, unit, text):
    assert si(number, unit) == text


def test_planning_needs_no_torch():
    code = "import sys, duollm.config as c, duollm.plan as p; p.render(p.plan(c.Recipe())); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "numpy"} & set(modules)
