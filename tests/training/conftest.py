import pytest

from tiny import tiny_model


@pytest.fixture(autouse=True)
def always(no_measuring):
    """No test of this folder measures the machine."""


@pytest.fixture
def model():
    return tiny_model().train()
