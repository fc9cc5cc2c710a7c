"""The search's peak memory stays within its budget, however many routes there are."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from duollm.oracle.tree import default_bytes

MEBIBYTE = 2**20
BUDGET = 32 * MEBIBYTE
# Tensors alive stay below half of the budget here (counted). The rest is what libraries keep: oneDNN holds kernels
# and scratch for every shape of block that it has met, and the allocator does not give all freed memory back.
SLACK = 32 * MEBIBYTE
TOKENS, WIDTH, FEW, TWICE, EIGHTFOLD = 63, 64, 10, 11, 13  # layers

MEASURE = f"""
import resource
import torch
from duollm import RouteSpace, search_oracle
from tiny import random_ids, tiny_model

def search(layers):
    model = tiny_model(hidden_size={WIDTH}, num_hidden_layers=layers)
    search_oracle(model, random_ids(1, {TOKENS + 1}), RouteSpace(layers), memory_bytes={BUDGET})
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

print(*(search(layers) for layers in ({FEW}, {TWICE}, {EIGHTFOLD})))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
def test_peak_memory_is_bounded_by_the_budget_not_by_the_number_of_routes():
    command = [sys.executable, "-c", MEASURE]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    few, twice, eightfold = map(int, said.stdout.split())
    more_leaves = (2**EIGHTFOLD - 2**FEW) * TOKENS * WIDTH * 4
    assert more_leaves / 1.5 > BUDGET + SLACK  # else nothing is tested
    assert twice - few <= BUDGET + SLACK
    assert eightfold - few <= BUDGET + SLACK


def test_by_default_a_search_takes_a_quarter_of_what_is_free_on_a_gpu(monkeypatch):
    """What torch keeps for later is free too: else a second search would be slower than the first."""
    figures = {
        "mem_get_info": (6 * MEBIBYTE, 9 * MEBIBYTE),
        "memory_reserved": 3 * MEBIBYTE,
        "memory_allocated": MEBIBYTE,
    }
    for name, figure in figures.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, figure=figure: figure)
    assert default_bytes(torch.device("cuda")) == 2 * MEBIBYTE
    assert default_bytes(torch.device("cpu")) == 1024 * MEBIBYTE
