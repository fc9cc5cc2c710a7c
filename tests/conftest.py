"""Fixtures shared by the tests of several packages."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from synthetic_run import Plan, Truth, write_run

# Before torch is imported: tests are small, and threads that spin while they wait slow all others down.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# A busy machine is no failure: how long one example takes is not what these tests are about.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Truth]]:
    """A run folder of known truth; read only."""
    run = tmp_path_factory.mktemp("runs") / "synthetic"
    return run, write_run(run)


@pytest.fixture(scope="session")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Truth], dict[str, Any]]:
    """An analysed run folder with several routers, its truth and its results; read only."""
    from duollm.analysis.analyse import analyse

    run = tmp_path_factory.mktemp("runs") / "compared"
    truths = write_run(run, Plan(more_routers=True, documents=8))
    return run, truths, analyse(run, bootstrap_samples=100)


@pytest.fixture
def own_run(synthetic: tuple[Path, dict[str, Truth]], tmp_path: Path) -> Path:
    """A copy of the synthetic run that a test may break."""
    return Path(shutil.copytree(synthetic[0], tmp_path / "run"))


@pytest.fixture(scope="module")
def quick_machine() -> Iterator[None]:
    """As `no_measuring`, for the whole studies of a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("duollm.training.loop.matmul_peak", lambda precision: 1e9)
        yield


@pytest.fixture
def no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's speed takes half a second to measure and decides nothing."""
    monkeypatch.setattr("duollm.training.loop.matmul_peak", lambda precision: 1e9)


@pytest.fixture
def training(tmp_path: Path, no_measuring: None) -> Any:
    """A tiny training that a test may vary, repeat and interrupt."""
    from tiny_training import Training

    return Training(tmp_path / "run")
