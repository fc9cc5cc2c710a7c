import pytest

from tiny import tiny_model
from tiny_training import Training


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch):
    """The machine's speed takes half a second to measure and decides nothing."""
    monkeypatch.setattr("duollm.train.loop.matmul_peak", lambda precision: 1e9)


@pytest.fixture
def training(tmp_path):
    return Training(tmp_path / "run")


@pytest.fixture
def model():
    return tiny_model().train()
