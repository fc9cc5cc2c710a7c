import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
)

from duollm import DuoForCausalLM
from duollm.config import Recipe
from duollm.errors import UserError
from duollm.flops import count_parameters, naive_search, sequence_flops, shared_search, training_flops
from duollm.plan import Devices, check_against, plan, planned_config, render, si
from duollm.recipe_files import load_recipe, to_yaml
from duollm.study import run_study

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


def numbers(recipe, table):
    """The values of a plan's table, named by its first word, by label."""
    return {row.label: row.value for row in plan(recipe) if row.table.split(",")[0].split(" ")[0] == table}


def memory(recipe):
    return {row.label: row.value for row in plan(recipe) if row.table.startswith("training memory")}


def test_parameters_are_those_of_the_model():
    counted = count_parameters(planned_config(small()))
    assert numbers(small(), "parameters") == counted._asdict() | {"total": counted.total}
    assert counted.embedding == 1000 * 32


def test_the_vocabulary_is_that_of_the_tokenizer_to_train():
    recipe = small(model__vocab_size="null", data__vocab_size="300")
    assert numbers(recipe, "parameters")["embedding"] == 300 * 32


def test_flops_per_token_are_the_mean_over_a_sequence():
    config = planned_config(small())
    planned = numbers(small(), "forward")
    assert planned["all small"] == sequence_flops(config, 0, 16) // 16
    assert planned["all big"] == sequence_flops(config, 4, 16) // 16
    assert planned["2 of 4 big"] * 2 == planned["all small"] + planned["all big"]


def test_steps_come_nearest_to_the_tokens():
    steps = {row.table: row.value for row in plan(small()) if row.label == "steps"}
    assert steps["training"] == 8  # 7.8: 1000 tokens in steps of 128
    assert steps["routers"] == 5  # 4.7: 300 tokens in steps of 64
    assert numbers(small(router__tokens="1"), "routers")["steps"] == 1


def test_training_compute_follows_the_branch_shares():
    recipe = small(pretrain__branch_shares="[0, 0, 1]")
    compute = numbers(recipe, "training")["compute"]
    assert compute == training_flops(planned_config(recipe), (0, 0, 1), 16, 1000)
    assert compute > numbers(small(), "training")["compute"]


def test_weights_gradients_and_moments_take_sixteen_bytes_per_parameter():
    recipe = small(pretrain__precision="bf16")
    total, needed = count_parameters(planned_config(recipe)).total, memory(recipe)
    assert needed["weights"] == needed["gradients"] == 4 * total
    assert needed["weights"] + needed["gradients"] + needed["moments"] == 16 * total
    assert needed.pop("total") == sum(needed.values())


@pytest.mark.parametrize(("precision", "bytes_per_logit"), [("fp32", 12), ("bf16", 10), ("auto", 12)])
def test_logits_are_those_of_one_micro_batch(precision, bytes_per_logit):
    micro_batch_tokens = 8 // 2 * 16
    assert memory(small(pretrain__precision=precision))["logits"] == micro_batch_tokens * 1000 * bytes_per_logit


def test_oracle_cost_is_that_of_all_windows():
    planned, config = numbers(small(), "oracle"), planned_config(small())
    windows = 2 * 3 * 5
    assert planned["tokens"] == windows * 16
    assert planned["compute, shared prefixes"] == windows * shared_search(config, 16).flops
    assert planned["compute, route by route"] == windows * naive_search(config, 16).flops
    assert (planned["routes"], planned["layers, route by route"]) == (2**4, 4 * 2**4)


def test_the_search_is_the_recipes_own():
    config = planned_config(small(model__num_hidden_layers="10"))
    beam = numbers(small(model__num_hidden_layers="10", oracle__search="beam"), "oracle")
    assert beam["layers, beam of 64"] == 1 + 2 + 4 + 8 + 16 + 32 + 4 * 64
    assert beam["compute, beam of 64"] == 30 * shared_search(config, 16, width=64).flops
    skip = numbers(small(oracle__branches="[skip, small, big]"), "oracle")
    assert (skip["routes"], skip["layers, shared prefixes"]) == (3**4, 1 + 3 + 9 + 27)
    local = numbers(small(oracle__search="local"), "oracle")  # its cost depends on the text
    assert set(local) == {"routes", "tokens", "layers, route by route", "compute, route by route"}


def checkpoint(config, folder):
    """A recipe on a dense checkpoint, of which only the configuration is there."""
    config.save_pretrained(folder)
    return small(model__dense=str(folder), pretrain__accumulate="1", oracle__search="beam")


def of_sizes(config_class, vocab_size, hidden, layers, heads, **more):
    sizes = {"vocab_size": vocab_size, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    return config_class(**sizes, **more)


# Sizes of published models, and their parameters in attention and FFNs, biases included.
CHECKPOINTS = {
    "SmolLM2-135M": of_sizes(
        LlamaConfig, 49152, 576, 30, 9, num_key_value_heads=3, intermediate_size=1536, tie_word_embeddings=True
    ),
    "Mistral-7B": of_sizes(MistralConfig, 32000, 4096, 32, 32, num_key_value_heads=8, intermediate_size=14336),
    "Qwen2.5-0.5B": of_sizes(
        Qwen2Config, 151936, 896, 24, 14, num_key_value_heads=2, intermediate_size=4864, tie_word_embeddings=True
    ),
    "Qwen3-0.6B": of_sizes(
        Qwen3Config,
        151936,
        1024,
        28,
        16,
        num_key_value_heads=8,
        intermediate_size=3072,
        head_dim=128,
        tie_word_embeddings=True,
    ),
    "OPT-125m": OPTConfig(),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_parameters_of_every_family_are_those_of_the_dense_model(tmp_path, name):
    planned = numbers(checkpoint(CHECKPOINTS[name], tmp_path), "parameters")
    with torch.device("meta"):
        dense = AutoModelForCausalLM.from_config(CHECKPOINTS[name])
    sizes = {name: parameter.numel() for name, parameter in dense.named_parameters()}
    assert planned["total"] - planned["small"] == sum(sizes.values())
    in_attention = [size for name, size in sizes.items() if "_attn." in name and "norm" not in name]
    in_ffns = [size for name, size in sizes.items() if ".mlp." in name or ".fc" in name]
    assert (planned["attention"], planned["big"]) == (sum(in_attention), sum(in_ffns))


def test_a_saved_duo_counts_as_the_dense_model_that_its_big_ffns_make(tmp_path):
    recipe = checkpoint(CHECKPOINTS["OPT-125m"], tmp_path / "dense")
    planned_config(recipe).save_pretrained(tmp_path / "duo")
    again = small(model__dense=str(tmp_path / "duo"), pretrain__accumulate="1", oracle__search="beam")
    assert numbers(again, "parameters") == numbers(recipe, "parameters")


class TestAgainstARun:
    @pytest.fixture
    def run(self, tmp_path):
        """A run whose training of 1,280 tokens took 10 s at half of a peak."""
        recipe = small(pretrain__tokens="1280")
        (tmp_path / "config.yaml").write_text(to_yaml(recipe))
        flops = training_flops(planned_config(recipe), recipe.pretrain.branch_shares, 16, 1280)
        logged = {"training": "pretrain", "tokens_per_second": 128, "flops": flops / 10, "peak_share": 0.5}
        records = [{"step": 5} | logged, {"step": 10} | logged, {"training": "linear", "step": 1}]
        (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
        return tmp_path, flops / 10 / 0.5

    @pytest.mark.parametrize(
        ("used", "planned", "remark"),
        [(0.5, 10, "+0%"), (0.45, 11, "+10%"), (0.25, 20, "+100%; it used 50% of its peak: plan with --mfu 0.50")],
    )
    def test_the_planned_time_stands_beside_the_measured_one(self, run, used, planned, remark):
        folder, peak = run
        rows = {row.label: row for row in check_against(folder, Devices(1, peak, used))}
        assert (rows["planned"].value, rows["measured"].value) == (planned, 10)
        assert rows["planned"].remark == remark

    def test_a_run_without_a_training_is_refused(self, run):
        (run[0] / "metrics.jsonl").write_text('{"training": "linear", "step": 1}')
        with pytest.raises(UserError, match="holds no step of a pretraining"):
            check_against(run[0], Devices(1, 1e9, 0.4))
        (run[0] / "metrics.jsonl").write_text("[]")
        with pytest.raises(UserError, match="not what a training writes"):
            check_against(run[0], Devices(1, 1e9, 0.4))


def test_published_sizes(tmp_path):
    qwen3, opt = (numbers(checkpoint(CHECKPOINTS[name], tmp_path), "parameters") for name in ("Qwen3-0.6B", "OPT-125m"))
    assert (qwen3["attention"], qwen3["total"] - qwen3["small"]) == (176_160_768, 596_049_920)
    assert (opt["big"], opt["total"] - opt["small"]) == (56_669_184, 125_239_296)


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
def test_activation_estimate_is_near_what_autograd_keeps(tmp_path, family):
    given = {"llama": LlamaConfig, "qwen3": Qwen3Config, "opt": OPTConfig}[family]
    inner = {"ffn_dim": 128, "word_embed_proj_dim": 32} if family == "opt" else {"intermediate_size": 128}
    wide = {"num_key_value_heads": 2, "head_dim": 32} if family == "qwen3" else {}
    recipe = checkpoint(of_sizes(given, 1000, 32, 4, 2, **inner, **wide), tmp_path)
    model = DuoForCausalLM(planned_config(recipe))
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
    assert memory(recipe)["activations"] == pytest.approx(measured, rel=0.15)


def test_a_trained_model_is_read_from_its_folder_and_needs_no_training(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "duo", "vocab_size": 77, "hidden_size": 10, "num_attention_heads": 2, "head_dim": 4})
    )
    recipe = small(model__path=str(tmp_path))
    assert numbers(recipe, "parameters")["embedding"] == 770
    assert not [row for row in plan(recipe) if row.table.startswith("training")]


@pytest.mark.parametrize("key", ["path", "dense"])
@pytest.mark.parametrize(
    "config", [None, "{", "[]", '{"model_type": "gpt2"}', '{"model_type": "duo", "vocab_size": "x"}']
)
def test_a_folder_without_a_known_model_is_one_line(tmp_path, key, config):
    if config:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match=rf"model\.{key}: .*{tmp_path.name}") as error:
        plan(small(**{f"model__{key}": str(tmp_path)}))
    assert "\n" not in str(error.value)


def test_sizes_that_make_no_model_are_one_line():
    with pytest.raises(UserError, match=r"model: head_dim \(3\) must be even"):
        plan(small(model__hidden_size="30", model__num_attention_heads="10"))


@pytest.mark.parametrize("hub_id", ["owner/name"])
def test_a_checkpoint_on_the_hub_has_the_recipes_sizes(hub_id):
    assert numbers(small(model__dense=hub_id), "parameters") == numbers(small(), "parameters")
    with pytest.raises(UserError, match=f"model.vocab_size: a plan loads nothing; give that of {hub_id}"):
        plan(small(model__dense=hub_id, model__vocab_size="null"))


def test_an_unknown_vocabulary_asks_for_its_size():
    with pytest.raises(UserError, match=r"model\.vocab_size: .* give that of somewhere"):
        plan(small(model__vocab_size="null", data__tokenizer="somewhere"))


def test_the_table_shows_the_numbers():
    text = render(plan(Recipe()))
    for shown in ("3.82 M", "2.36 M", "24.9 TFLOP", "4,095", "49,152", "732"):
        assert shown in text


def test_a_network_too_deep_to_search_in_full_is_still_planned():
    rows = plan(small(model__num_hidden_layers="60", oracle__search="beam"))
    assert "6.92e+7 T" in render(rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__num_hidden_layers": "40"}, r"oracle\.search: exact would try 2\^40 routes"),
        ({"router__kinds": "[liner]"}, r"router\.kinds: unknown router 'liner'; did you mean 'linear'"),
        ({"oracle__more_budgets": "[at-most 9]"}, r"oracle\.big_layers or more_budgets: "),
        ({"oracle__big_layers": "[99]"}, r"oracle\.big_layers or more_budgets: .* 99 big layers is impossible"),
        ({"router__big_layers": "[99]"}, r"router\.big_layers holds 99"),
        ({"data__sequence_length": "4096"}, r"data\.sequence_length \(4096\) must not exceed the 2048 positions"),
    ],
)
def test_a_plan_refuses_what_a_study_refuses(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        plan(small(**changes))
    with pytest.raises(UserError, match=message):
        run_study(small(**changes), tmp_path / "run", [])
    assert not (tmp_path / "run").exists()


def test_a_plan_knows_the_layers_of_a_checkpoint(tmp_path):
    recipe = checkpoint(CHECKPOINTS["OPT-125m"], tmp_path)
    router = recipe.router.model_copy(update={"big_layers": [13]})
    with pytest.raises(UserError, match=r"router\.big_layers holds 13; .* has 12 layers"):
        plan(recipe.model_copy(update={"router": router}))


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


def test_time_is_compute_over_what_the_devices_do():
    devices = Devices(2, 1e9, 0.5)
    of = numbers(small(), "training")
    times = {row.label: row.value for row in plan(small(), devices) if row.table.startswith("time on 2 x 1.00 GFLOP/s")}
    assert times["training"] == round(of["compute"] / 1e9)
    oracle = numbers(small(), "oracle")
    for how in ("shared prefixes", "route by route"):
        assert times[f"oracle, {how}"] == round(oracle[f"compute, {how}"] / 1e9)


def test_devices_share_the_batch_and_not_the_weights():
    table = "training memory on each device, not sharded"
    shared = {row.label: row.value for row in plan(small(), Devices(4, 1e9, 0.5)) if row.table == table}
    alone = memory(small())
    assert shared["logits"] * 4 == alone["logits"]
    assert (shared["weights"], shared["activations"] * 4) == (alone["weights"], alone["activations"])
    with pytest.raises(UserError, match=r"batch_size \(8\) must be divisible by 3 devices x pretrain.accumulate \(2\)"):
        plan(small(), Devices(3, 1e9, 0.5))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(119, "119 s"), (600, "10 min"), (36_000, "10.0 h"), (3_600_000, "1,000 h"), (10**15, "3.17e+7 years")],
)
def test_times_are_short(seconds, text):
    assert si(seconds, "s") == text
