"""Fixtures shared by the tests of several packages."""

import shutil
from pathlib import Path

import pytest

from synthetic_run import Truth, write_run


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Truth]]:
    """A run folder of known truth; read only."""
    run = tmp_path_factory.mktemp("runs") / "synthetic"
    return run, write_run(run)


@pytest.fixture
def own_run(synthetic: tuple[Path, dict[str, Truth]], tmp_path: Path) -> Path:
    """A copy of the synthetic run that a test may break."""
    return Path(shutil.copytree(synthetic[0], tmp_path / "run"))
