import pytest
import torch

from duollm.models.branch import Branch
from duollm.routing.linear import LinearRouter
from tiny import SIZES


@pytest.fixture
def make_router():
    """Routers with random weights, in evaluation mode."""

    def make(branches=(Branch.SMALL, Branch.BIG), seed=0, num_layers=SIZES["num_hidden_layers"]):
        router = LinearRouter(num_layers, SIZES["hidden_size"], branches).eval()
        generator = torch.Generator().manual_seed(seed)
        for parameter in router.parameters():
            torch.nn.init.normal_(parameter, generator=generator)
        return router

    return make
