"""Transformers' auto classes know the duo in a fresh process, whatever was imported first."""

import subprocess
import sys

import pytest
import torch

from tiny import tiny_model

IMPORTS = {
    "duollm first": "import duollm, transformers",
    "auto classes first": "import transformers.models.auto.modeling_auto, duollm",
    "the model's file first": "import duollm.models.modeling_duo, transformers",
    "a dense class first": "import duollm, transformers; from transformers import LlamaForCausalLM",
    "a dense class before all": "import transformers; transformers.Qwen3ForCausalLM; import duollm",
}

LOAD = """
import sys, torch
print(type(transformers.AutoConfig.from_pretrained(sys.argv[1])).__name__)
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], attn_implementation="eager")
base = transformers.AutoModel.from_pretrained(sys.argv[1], attn_implementation="eager")
print(type(base).__name__, type(model).__name__, model(torch.arange(5)[None]).logits.double().sum().item())
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tiny_model().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("imports", IMPORTS.values(), ids=IMPORTS.keys())
def test_a_fresh_process_loads_a_saved_duo(saved, imports):
    code = [sys.executable, "-c", imports + LOAD, str(saved)]
    run = subprocess.run(code, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-1000:]
    *classes, total = run.stdout.split()
    assert classes == ["DuoConfig", "DuoModel", "DuoForCausalLM"]
    expected = tiny_model()(torch.arange(5)[None]).logits.double().sum().item()
    assert float(total) == pytest.approx(expected, abs=1e-4)
