"""Dense checkpoints become duo folders."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from duollm import cli
from duollm.config import ConvertConfig, DataConfig
from duollm.convert.dense import convert, open_dense
from duollm.convert.saving import History, load_model
from duollm.data.packing import prepare_data
from duollm.errors import UserError
from tiny import random_ids
from tiny_corpus import write_corpus
from tiny_dense import write_dense


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    return write_dense(folder / "tiny-llama", write_corpus(folder / "owls"))


@pytest.fixture(scope="module")
def data(dense):
    config = DataConfig(domains=[str(dense.parent / "owls")], tokenizer=str(dense), sequence_length=16)
    return prepare_data(config, seed=0, folder=dense.parent / "data")


@pytest.fixture
def converted(dense, data, tmp_path):
    """Convert with some settings changed and return the folder."""

    def run(dtype=None, **settings):
        config = ConvertConfig(**{"sample_tokens": 640, "steps": 5, **settings})
        with_text = None if config.small_init == "random" else data
        convert(open_dense(str(dense), 6, "ffn", 0, dtype), str(dense), config, with_text, 0, tmp_path / "duo")
        return tmp_path / "duo"

    return run


@pytest.mark.parametrize("small_init", ["random", "slice", "distilled", "linear"])
def test_all_big_is_the_dense_model_and_small_is_something_else(dense, converted, small_init):
    duo, ids = load_model(converted(small_init=small_init)), random_ids()
    theirs = AutoModelForCausalLM.from_pretrained(dense)(ids).logits
    torch.testing.assert_close(duo(ids).logits, theirs, atol=1e-4, rtol=0)
    assert not torch.allclose(duo(ids, routes=[1, 1, 1]).logits, theirs, atol=0.1)


def test_the_folder_is_whole_and_tells_its_history(dense, converted):
    folder = converted()
    text = "the cat sat on a mat"
    assert AutoTokenizer.from_pretrained(folder)(text) == AutoTokenizer.from_pretrained(dense)(text)
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 0
    first, second = History.read(folder).steps
    assert first == "Converted from the dense checkpoint tiny-llama, whose FFNs are the big ones"
    assert "trained to imitate them" in second
    assert "640 tokens" in second
    assert str(dense.parent) not in (folder / "README.md").read_text()


def test_the_seed_decides_everything(dense, data, tmp_path):
    def weights(name, seed):
        model = open_dense(str(dense), 6, "ffn", seed)
        convert(model, str(dense), ConvertConfig(sample_tokens=320, steps=3), data, seed, tmp_path / name)
        return load_model(tmp_path / name).state_dict()

    first, again, other = weights("first", 1), weights("again", 1), weights("other", 2)
    assert all(torch.equal(value, first[name]) for name, value in again.items())
    assert {name for name, value in other.items() if not torch.equal(value, first[name])} == {
        name for name in first if ".mlp.small." in name
    }


def test_weights_are_of_the_wanted_type(converted):
    folder = converted(dtype=torch.bfloat16)
    assert {value.dtype for value in load_model(folder, "auto").state_dict().values()} == {torch.bfloat16}


def test_an_unsupported_model_is_refused_in_a_line(tmp_path):
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"cannot be converted: model type 'gpt2' is not supported; supported are"):
        open_dense(str(tmp_path), 6, "ffn", 0)


def test_a_small_ffn_wider_than_the_big_one_is_refused(dense):
    with pytest.raises(UserError, match=r"small_intermediate_size \(25\) must not exceed .* \(24\)"):
        open_dense(str(dense), 25, "ffn", 0)


def test_a_linear_small_ffn_of_a_rank_above_the_width_is_refused_before_the_work(dense, data, tmp_path):
    model, told = open_dense(str(dense), 17, "ffn", 0), []
    config = ConvertConfig(small_init="linear", sample_tokens=640)
    with pytest.raises(UserError, match=r"small_intermediate_size \(17\) is the rank .* \(16\); give a smaller one"):
        convert(model, str(dense), config, data, 0, tmp_path / "duo", told.append)
    assert told == []
    assert not (tmp_path / "duo").exists()


def test_too_little_sample_text_is_refused(converted, tmp_path):
    with pytest.raises(UserError, match=r"sample_tokens \(31\) must be at least two windows of 16 tokens"):
        converted(sample_tokens=31)
    assert not (tmp_path / "duo").exists()


def test_a_duo_gives_its_big_ffns(converted):
    """How big can be trained alone, frozen, and small trained after it."""
    folder = converted(small_init="slice")
    before, again = load_model(folder), open_dense(str(folder), 4, "ffn", 1)
    ids = random_ids()
    torch.testing.assert_close(again(ids).logits, before(ids).logits, atol=1e-5, rtol=0)
    assert again.config.small_intermediate_size == 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("convert")
    write_dense(folder / "dense", write_corpus(folder / "owls"), intermediate_size=32)
    GPT2Config().save_pretrained(folder / "gpt2")
    return folder


@pytest.fixture
def command(folder, tmp_path, monkeypatch, capsys):
    """Run the verb on the tiny dense model; return exit code, output and the folder to write."""
    monkeypatch.setattr("duollm.cli.tune_memory", lambda: True)
    monkeypatch.chdir(folder)
    text = {"--domains": "owls", "--sequence-length": "16", "--sample-tokens": "320", "--steps": "3"}

    def run(*arguments, dense="dense"):
        rest = [each for flag, value in text.items() if flag not in arguments for each in (flag, value)]
        code = cli.main(["convert", dense, "--out", str(tmp_path / "duo"), *rest, *arguments])
        return code, capsys.readouterr(), tmp_path / "duo"

    return run


def test_it_writes_a_duo_with_a_sixteenth_of_the_width(command, folder):
    code, output, out = command()
    assert code == 0
    assert "small FFN of layer 3/3: explains" in output.out
    duo, ids = load_model(out), random_ids()
    assert duo.config.small_intermediate_size == 2
    theirs = AutoModelForCausalLM.from_pretrained(folder / "dense")(ids).logits
    torch.testing.assert_close(duo(ids).logits, theirs, atol=1e-4, rtol=0)


def test_options_reach_the_model_and_random_needs_no_text(command):
    options = ["--small-init", "random", "--small-intermediate-size", "5", "--skip-scope", "layer"]
    code, output, out = command(*options, "--dtype", "bfloat16", "--domains", "nowhere")
    assert code == 0, output.err
    duo = load_model(out, "auto")
    assert (duo.config.small_intermediate_size, duo.config.skip_scope, duo.dtype) == (5, "layer", torch.bfloat16)


@pytest.mark.parametrize(
    ("arguments", "dense", "complaint"),
    [
        ([], "gpt2", "gpt2: cannot be converted: model type 'gpt2' is not supported"),
        ([], "absent", "absent: cannot be converted: "),
        (["--steps", "0"], "dense", "--steps: "),
        (["--sequence-length", "1"], "dense", "--sequence-length: "),
        (["--sample-tokens", "20"], "dense", "--sample-tokens (20) must be at least two windows of 16"),
        (["--small-intermediate-size", "33"], "dense", "--small-intermediate-size (33) must not exceed"),
        (["--small-intermediate-size", "0"], "dense", "small_intermediate_size must be at least 1, got 0"),
        (["--domains", "owls,owls"], "dense", "--domains: 'owls,owls' holds 'owls' twice"),
        (["--domains", "nowhere"], "dense", "nowhere"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_refused_in_a_line_and_leaves_nothing(command, monkeypatch, arguments, dense, complaint):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, output, out = command(*arguments, dense=dense)
    assert code == 2
    assert complaint in output.err
    assert output.err.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize("small_init", ["random", "slice"])
def test_a_tokenizer_with_tokens_that_the_model_lacks_is_refused(command, folder, tmp_path, small_init):
    shutil.copytree(folder / "dense", tmp_path / "grown")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "grown")
    tokenizer.add_tokens(["<|user|>", "<|model|>"])
    tokenizer.save_pretrained(tmp_path / "grown")
    code, output, out = command("--small-init", small_init, dense=str(tmp_path / "grown"))
    assert code == 2
    assert re.search(r"grown: knows 300 tokens, its tokenizer has 30\d; resize", output.err)
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        ("model.safetensors", b"<html>", "no whole safetensors file"),
        ("config.json", b"[]", "has a config.json that cannot be read"),
        ("config.json", b"version https://git-lfs.github.com/spec/v1\n", "has a config.json that cannot be read"),
        ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        ("tokenizer.json", b"[]", "tokenizer damaged: "),
        ("tokenizer_config.json", b"[" * 10_000, "tokenizer damaged: "),
    ],
)
def test_a_damaged_checkpoint_is_refused_in_a_line(command, folder, name, content, complaint):
    shutil.copytree(folder / "dense", folder / "damaged", dirs_exist_ok=True)
    (folder / "damaged" / name).write_bytes(content)
    code, output, out = command(dense="damaged")
    assert code == 2
    assert complaint in output.err
    assert output.err.count("\n") == 1
    assert not out.exists()


def test_ffns_that_overflow_are_refused(command, folder):
    shutil.copytree(folder / "dense", folder / "hot")
    weights = load_file(folder / "hot" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] *= 1e30
    weights["model.layers.1.mlp.down_proj.weight"] *= 1e30
    save_file(weights, folder / "hot" / "model.safetensors", {"format": "pt"})
    code, output, out = command(dense="hot")
    assert code == 2
    assert "NaN or infinity on this text" in output.err
    assert not out.exists()


@pytest.mark.parametrize("domains", ["owls,", ",owls", "", "owls,,code"])
def test_a_domain_without_a_name_is_refused(command, domains):
    code, output, _ = command("--domains", domains)
    assert code == 2
    assert "--domains: " in output.err
    assert "empty" in output.err


def test_a_folder_that_holds_something_is_not_overwritten(command):
    _, _, out = command("--small-init", "random")
    code, output, _ = command("--small-init", "random")
    assert code == 2
    assert f"--out {out} exists already" in output.err
