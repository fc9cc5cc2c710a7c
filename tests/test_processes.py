"""The command line under torchrun's environment: two processes leave the oracle of one."""

import os
import subprocess
import sys

import pandas as pd
import pytest

from ports import free_port
from tiny import tiny_model
from tiny_corpus import write_corpus


def oracle_command(folder, run):
    settings = {
        "out": run,
        "model.path": folder / "model",
        "data.domains": f"[{folder / 'owls'}]",
        "data.vocab_size": 280,
        "data.sequence_length": 8,
        "data.test_share": 0.4,
        "oracle.documents": 10,
        "oracle.random_routes": 3,
        "router.big_layers": "[1]",
    }
    flags = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    return [sys.executable, "-m", "duollm", "oracle", *flags]


def run_processes(command, count):
    """What torchrun does, without the seconds that it takes; on CPUs, since there may be one GPU for two processes."""
    port = free_port()
    started = []
    for rank in range(count):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        environment = {key: str(value) for key, value in place.items()} if count > 1 else {}
        environment = os.environ | environment | {"CUDA_VISIBLE_DEVICES": ""}
        started.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [0] * count, said


@pytest.mark.slow
def test_two_processes_leave_the_oracle_of_one(tmp_path):
    write_corpus(tmp_path / "owls", documents=36, seed=0)
    tiny_model(vocab_size=280).save_pretrained(tmp_path / "model")
    for count in (1, 2):
        run_processes(oracle_command(tmp_path, tmp_path / f"run{count}"), count)
    for kind in ("", ".routes", ".best_of"):
        alone, together = (
            pd.read_parquet(tmp_path / f"run{count}" / "oracle" / f"owls{kind}.parquet") for count in (1, 2)
        )
        pd.testing.assert_frame_equal(alone, together)
