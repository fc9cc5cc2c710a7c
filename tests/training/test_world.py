"""Two processes on one global batch do what one process does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from duollm.errors import UserError
from duollm.training.world import World, join_world
from ports import free_port
from tiny import tiny_model
from tiny_training import regression_rows

SCRIPT = Path(__file__).parents[1] / "distributed_training.py"


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The folder that two processes have left behind."""
    folder = tmp_path_factory.mktemp("together")
    port = free_port()
    started = [start(rank, folder, port) for rank in range(2)]
    said = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    return folder


def start(rank: int, folder: Path, port: int) -> subprocess.Popen:
    """What torchrun does, without the seconds that it takes; on CPUs, since there may be one GPU for two processes."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    environment = os.environ | {key: str(value) for key, value in place.items()} | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), str(folder)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_train_the_weights_of_one(together, training):
    alone = training(tiny_model().train()).state_dict()
    first, second = (torch.load(together / f"weights{rank}.pt") for rank in range(2))
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, atol=1e-4, rtol=1e-3)


def test_two_processes_fit_the_router_of_one(together):
    router, sums, input_LNF, target_LNC = regression_rows()
    for step in range(4):
        sums.add(step, input_LNF[:, step::4], target_LNC[:, step::4], World(0, 1, torch.device("cpu")))
    sums.fit(router)
    first, second = (torch.load(together / f"fitted{rank}.pt") for rank in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, router.weight_LCD.data)


def test_losses_and_gradients_are_means_over_processes(together, training):
    training(tiny_model().train())

    def measured(run, key):
        return [json.loads(line)[key] for line in (run / "metrics.jsonl").read_text().splitlines()]

    for key in ("loss", "gradient_norm"):  # AdamW would hide the scale of the gradients
        assert measured(together / "whole", key) == pytest.approx(measured(training.run, key), rel=1e-3)


def test_all_stop_when_one_is_asked_to(together):
    said = [(together / f"stop{rank}.txt").read_text() for rank in range(2)]
    assert said == ["stopped after step 3; run the same command to continue"] * 2
    assert (together / "stopped" / "resume" / "tiny.pt").exists()


def test_without_torchrun_the_world_is_one(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world = join_world()
    assert (world.rank, world.size, world.first) == (0, 1, True)
    batch = torch.arange(6).view(3, 2)
    assert torch.equal(world.share(batch).cpu(), batch)
    assert world.average(torch.tensor(2.5)) == 2.5
    assert world.any(True)
    assert not world.any(False)
    world.wait()


def test_shares_are_disjoint_and_complete():
    batch = torch.arange(8)
    shares = [World(rank, 2, torch.device("cpu")).share(batch) for rank in range(2)]
    assert sorted(torch.cat(shares).tolist()) == batch.tolist()
    assert [len(share) for share in shares] == [4, 4]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"WORLD_SIZE": "2"}, "sets WORLD_SIZE but not RANK, MASTER_ADDR, MASTER_PORT; .* torchrun"),
        ({"RANK": "0"}, "sets RANK but not WORLD_SIZE"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "but not MASTER_PORT"),
        ({"RANK": "first", "WORLD_SIZE": "2"}, "RANK to 'first'; torchrun sets it to a whole number"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE to 'two'"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK to '-1'"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "RANK must be below WORLD_SIZE"),
        (
            {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "99999"},
            "cannot meet at localhost, port 99999, .*65535",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "9" * 20, "MASTER_ADDR": "localhost", "MASTER_PORT": "29501"},
            "cannot meet at localhost, port 29501",
        ),
    ],
)
def test_half_of_what_torchrun_sets_is_refused_in_a_line(monkeypatch, environment, expected):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=expected):
        join_world()
