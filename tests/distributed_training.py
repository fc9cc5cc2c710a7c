"""What every process of tests/training/test_world.py does; its environment is that which torchrun sets."""

import os
import signal
import sys
from pathlib import Path

import torch

from duollm.training import loop
from duollm.training.world import World, join_world
from tiny import tiny_model
from tiny_training import Training, batch_at, regression_rows


def train_whole(world: World, folder: Path) -> None:
    model = Training(folder / "whole", world)(tiny_model().train(), accumulate=2)
    torch.save(model.state_dict(), folder / f"weights{world.rank}.pt")


def train_until_one_is_asked_to_stop(world: World, folder: Path) -> None:
    """Only the second process gets the signal; both must stop after the same step."""

    def batches(step):
        if step == 2 and not world.first:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch_at(step)

    try:
        Training(folder / "stopped", world)(tiny_model().train(), batches=batches, checkpoint_every=100)
    except KeyboardInterrupt as stop:
        (folder / f"stop{world.rank}.txt").write_text(str(stop))


def fit_by_sums(world: World, folder: Path) -> None:
    """Every process adds its rows to the sums of a regression."""
    router, sums, input_LNF, target_LNC = regression_rows()
    for step in range(4):
        mine = slice(world.rank, None, world.size)
        sums.add(step, input_LNF[:, step::4][:, mine], target_LNC[:, step::4][:, mine], world)
    sums.fit(router)
    torch.save(router.weight_LCD.data, folder / f"fitted{world.rank}.pt")


def without_measuring(precision: str) -> float:
    """The machine's speed takes half a second to measure and decides nothing."""
    return 1e9


if __name__ == "__main__":
    loop.matmul_peak = without_measuring
    together = join_world()
    train_whole(together, Path(sys.argv[1]))
    train_until_one_is_asked_to_stop(together, Path(sys.argv[1]))
    fit_by_sums(together, Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
