import pytest
import torch

from duollm.models.branch import Branch
from duollm.routers.linear import LinearRouter
from tiny import tiny_config


@pytest.fixture(autouse=True)
def always(no_measuring):
    """No test of this folder measures the machine."""


@pytest.fixture
def make_random():
    """Routers with random weights, in evaluation mode."""

    def make(branches=(Branch.SMALL, Branch.BIG), seed=0, kind=LinearRouter, **sizes):
        router = kind(tiny_config(**sizes), branches).eval()
        generator = torch.Generator().manual_seed(seed)
        for parameter in router.parameters():
            torch.nn.init.normal_(parameter, generator=generator)
        return router

    return make
