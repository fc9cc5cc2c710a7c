import json
import re

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoTokenizer

from duollm.config import ModelConfig, PretrainConfig
from duollm.convert.saving import History, load_model, save_model
from duollm.data.packed import PackedData
from duollm.errors import UserError
from duollm.models.branch import Branch
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.training.loop import Context
from duollm.training.pretrain import (
    compile_for_training,
    duo_config,
    pays,
    plain_again,
    prepare_for_training,
    pretrain,
    random_routing_loss,
    why_it_fails,
)
from duollm.training.world import World
from tiny import random_ids, tiny_model
from tiny_corpus import packed_corpus
from tiny_training import ALONE

SIZES = ModelConfig(hidden_size=16, num_hidden_layers=2, intermediate_size=32, small_intermediate_size=8)

SHARES = (0.25, 0.25, 0.5)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return packed_corpus(tmp_path_factory.mktemp("corpus"))


def test_pretraining_learns_and_leaves_a_model_with_its_tokenizer(tmp_path, data):
    config = PretrainConfig(tokens=16 * 8 * 40, batch_size=8, precision="fp32", log_every=1, checkpoint_every=5)
    pretrain(Context(tmp_path, data, 0, ALONE), SIZES, config)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 40
    assert losses[-1] < losses[0] - 1
    assert not list((tmp_path / "resume").iterdir())
    model = DuoForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert (model.config.vocab_size, model.config.num_hidden_layers) == (data.vocab_size, 2)
    ids = torch.from_numpy(data.train_batch(0, 8, seed=0))
    assert model(ids, labels=ids).loss < losses[0] - 1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    text = "the cat sat on a mat"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token_id == model.config.eos_token_id == data.end_of_text_id


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(data):
    with pytest.raises(UserError, match=rf"the model's vocab_size \(8\) is smaller .* \({data.vocab_size}\)"):
        duo_config(SIZES.model_copy(update={"vocab_size": 8}), data)


def test_sizes_that_make_no_model_are_refused_in_a_line(data):
    with pytest.raises(UserError, match=r"model: head_dim \(3\) must be even"):
        duo_config(SIZES.model_copy(update={"hidden_size": 6}), data)


def test_the_loss_is_that_of_exact_random_shares():
    """Two of eight tokens skip, two go small, four big, drawn anew in every layer, step, part and process."""
    model, ids = tiny_model(), random_ids(batch=2, tokens=4)
    seen = []
    forward = model.forward
    model.forward = lambda **inputs: seen.append(forward(**inputs)) or seen[-1]
    for rank, step, part in [(0, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0), (0, 0, 0)]:
        loss_fn = random_routing_loss(model, (0.25, 0.25, 0.5), seed=3, world=World(rank, 2, torch.device("cpu")))
        loss, _ = loss_fn(ids, step, part)
        routes = seen[-1].routes
        assert all(torch.bincount(routes[..., layer].flatten()).tolist() == [2, 2, 4] for layer in range(3))
        torch.testing.assert_close(loss, forward(ids, labels=ids, routes=routes).loss)
    drawn = {tuple(output.routes.flatten().tolist()) for output in seen}
    assert len(drawn) == 4
    assert torch.equal(seen[0].routes, seen[4].routes)
    assert seen[0].routes.unique(dim=-1).shape[-1] > 1, "layers must not share their draw"
    assert set(seen[0].routes.unique().tolist()) == set(Branch)


class TestFromAConvertedModel:
    @pytest.fixture
    def converted(self, tmp_path, data):
        folder = tmp_path / "converted"
        save_model(tiny_model(vocab_size=data.vocab_size), data.tokenizer, folder, History(("Converted",)))
        return folder

    @pytest.fixture
    def trained(self, tmp_path, data, converted):
        """Train from it and return the weights before and after."""

        def run(run="run", **settings):
            config = PretrainConfig(
                **{"tokens": 16 * 8 * 6, "batch_size": 8, "precision": "fp32", "checkpoint_every": 2, **settings}
            )
            before = load_model(converted).state_dict()
            pretrain(Context(tmp_path / run, data, 0, ALONE), SIZES, config, converted)
            assert all(torch.equal(value, before[name]) for name, value in load_model(converted).state_dict().items())
            return before, load_model(tmp_path / run / "model").state_dict()

        return run

    @pytest.mark.parametrize(
        ("freeze", "learns"), [("big", r"\.mlp\.small\."), ("all-but-norms", r"norm\.weight"), ("nothing", "")]
    )
    def test_what_is_frozen_stays(self, trained, freeze, learns):
        before, after = trained(freeze=freeze)
        changed = {name for name in before if not torch.equal(after[name], before[name])}
        assert changed == {name for name in before if re.search(learns, name)}

    def test_the_small_ffns_learn(self, tmp_path, trained):
        trained(freeze="big", tokens=16 * 8 * 40, log_every=1, learning_rate=0.03)
        losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        assert losses[-1] < losses[0] - 0.3

    def test_a_resumed_training_is_the_uninterrupted_one(self, tmp_path, trained, monkeypatch):
        _, whole = trained(freeze="big")
        train_batch = PackedData.train_batch

        def dying_batch(data, step, *arguments, **settings):
            if step == 3:
                raise OSError("power cut")
            return train_batch(data, step, *arguments, **settings)

        with monkeypatch.context() as patch:
            patch.setattr(PackedData, "train_batch", dying_batch)
            with pytest.raises(OSError, match="power cut"):
                trained("resumed", freeze="big")
        kept = torch.load(tmp_path / "resumed" / "resume" / "pretrain.pt", weights_only=True)["trained"]
        assert all(".mlp.small." in name for name in kept)
        _, resumed = trained("resumed", freeze="big")
        assert all(torch.equal(value, whole[name]) for name, value in resumed.items())

    def test_no_tokens_means_no_training(self, tmp_path, trained):
        before, after = trained(tokens=0)
        assert all(torch.equal(after[name], value) for name, value in before.items())
        assert History.read(tmp_path / "run" / "model").steps == ("Converted",)

    def test_the_card_goes_on(self, tmp_path, trained):
        trained(freeze="big")
        first, second = History.read(tmp_path / "run" / "model").steps
        assert first == "Converted"
        assert second.startswith("Trained, only the small FFNs, on 768 tokens")


class TestCompiling:
    @pytest.fixture
    def train(self, tmp_path, data, capsys):
        """Train for six steps; return what was said about compiling and the weights."""

        def run(name, **settings):
            torch._dynamo.reset()
            config = PretrainConfig(tokens=16 * 8 * 6, batch_size=8, precision="fp32", **settings)
            pretrain(Context(tmp_path / name, data, 0, ALONE), SIZES, config)
            said = [line for line in capsys.readouterr().out.splitlines() if "compile" in line]
            return said, load_model(tmp_path / name / "model").state_dict()

        return run

    def test_short_trainings_are_not_compiled_and_say_so(self, train):
        (said,), _ = train("auto")
        assert said.startswith("pretrain: without torch.compile: compiling takes about")

    def test_compiled_weights_are_the_plain_ones(self, train, monkeypatch):
        compile_it = torch.compile
        monkeypatch.setattr(torch, "compile", lambda part, **how: compile_it(part, backend="aot_eager", **how))
        (said,), compiled = train("compiled", compile=True)
        assert re.fullmatch(r"pretrain: compiled in \d+ s: as pretrain.compile says", said)
        _, plain = train("plain", compile=False)
        for name, weight in compiled.items():
            torch.testing.assert_close(weight, plain[name], atol=1e-4, rtol=1e-4, msg=name)

    def test_without_a_compiler_the_training_goes_on_plainly(self, train, monkeypatch):
        def no_compiler(part, **how):
            def call(*arguments, **keywords):
                raise RuntimeError("no C++ compiler found\nand so on")

            return call

        monkeypatch.setattr(torch, "compile", no_compiler)
        (said,), fallen_back = train("broken", compile=True)
        assert said == "pretrain: without torch.compile, which fails: no C++ compiler found"
        _, plain = train("plain", compile=False)
        assert all(torch.equal(weight, plain[name]) for name, weight in fallen_back.items())


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


@pytest.mark.parametrize("whole", [False, True], ids=["halves", "whole"])
@pytest.mark.parametrize("scope", ["ffn", "layer"])
def test_compiled_training_is_the_plain_one_and_all_layers_share_the_code(scope, whole):
    model, ids = tiny_model(num_hidden_layers=4, skip_scope=scope), random_ids(batch=2, tokens=8)
    prepare_for_training(model)
    plain = [gradients(model, random_routing_loss(model, SHARES, 0, ALONE), ids, step) for step in range(2)]
    counter = CompileCounterWithBackend("aot_eager")
    loss_fn = random_routing_loss(model, SHARES, 0, ALONE, compile_for_training(model, whole, backend=counter))
    for step, (loss, wanted) in enumerate(plain):
        compiled_loss, found = gradients(model, loss_fn, ids, step)
        torch.testing.assert_close(compiled_loss, loss)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, wanted[name], atol=1e-6, rtol=1e-5, msg=name)
    assert counter.frame_count == (2 if whole else 3), "the layers or two halves of them, and the head"
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
