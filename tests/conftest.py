"""Fixtures shared by the tests of several packages."""

import os
import shutil
from pathlib import Path

import pytest

from synthetic_run import Truth, write_run

# Before torch is imported: tests are small, and threads that spin while they wait slow all others down.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Truth]]:
    """A run folder of known truth; read only."""
    run = tmp_path_factory.mktemp("runs") / "synthetic"
    return run, write_run(run)


@pytest.fixture
def own_run(synthetic: tuple[Path, dict[str, Truth]], tmp_path: Path) -> Path:
    """A copy of the synthetic run that a test may break."""
    return Path(shutil.copytree(synthetic[0], tmp_path / "run"))
