"""Running Python in a process that has transformers but no duollm: what somebody has who is only sent a model."""

import os
import subprocess
import sys
from pathlib import Path

_HIDE = """
import sys

class NoDuollm:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "duollm":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoDuollm())
"""


def run_without_duollm(code: str, folder: Path, cache: Path) -> str:
    """Run `code` in `folder` and return what it prints; transformers keeps its copies of model code in `cache`."""
    environment = os.environ | {"HF_MODULES_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", _HIDE + code]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout
