"""Ridge regression from sums, against the same regression on all rows at once."""

import pytest
import torch

from duollm.config import RouterConfig
from duollm.models.branch import Branch
from duollm.routers.lesson import Lesson
from duollm.routers.registry import make_router
from duollm.routers.regression import RidgeSums, regress_gains
from duollm.training.optimizer import TrainingPlan
from tiny import tiny_model
from tiny_training import ALONE, batch_at, regression_rows

PLAN = TrainingPlan(steps=8, batch_size=4, learning_rate=1.0, checkpoint_every=3, log_every=8)


def test_the_fit_is_that_of_all_rows_at_once():
    router, sums, input_LNF, target_LNC = regression_rows()
    for step in range(8):
        part = slice(50 * step, 50 * (step + 1))
        sums.add(step, input_LNF[:, part], target_LNC[:, part], ALONE)
    sums.fit(router)
    for layer in range(3):
        x_NF = torch.nn.functional.pad(input_LNF[layer], (0, 1), value=1.0).double()
        held_F = torch.full((x_NF.shape[1],), 1e-6)
        held_F[: sums.held] = sums.penalty
        scale = input_LNF[layer, :, : sums.held].double().square().sum(0).mean()
        rows_FF = (held_F * scale).sqrt().diag().double()  # a ridge is a row of its own for each weight
        stacked = torch.cat([x_NF, rows_FF]), torch.cat([target_LNC[layer].double(), rows_FF.new_zeros(len(held_F), 2)])
        expected_FC = torch.linalg.lstsq(*stacked).solution.float()
        torch.testing.assert_close(router.weight_LCD[layer].T, expected_FC[:-1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(router.bias_LC[layer], expected_FC[-1], rtol=1e-4, atol=1e-5)


def test_the_penalty_is_the_best_for_what_was_left_out():
    """Targets that nothing predicts ask for the largest penalty, those without noise for the smallest."""
    router, _, input_LNF, target_LNC = regression_rows()
    for targets, penalty, explained in ((target_LNC * 0, 0.01, None), (torch.randn(target_LNC.shape), 10.0, 0.1)):
        sums = RidgeSums(router)
        known = (input_LNF @ torch.ones(input_LNF.shape[-1], 2)) if explained is None else targets
        for step in range(8):
            part = slice(50 * step, 50 * (step + 1))
            sums.add(step, input_LNF[:, part], known[:, part], ALONE)
        sums.fit(router)
        assert sums.penalty == penalty
        assert sums.explained > 0.99 if explained is None else sums.explained < explained


def _regress(run, branches=("small", "big"), stop_after=None):
    model = tiny_model().requires_grad_(False)
    router = make_router("sequential", model.config, list(branches))
    seen = 0

    def batches(step):
        nonlocal seen
        seen += 1
        if seen == stop_after:
            raise RuntimeError("killed")
        return batch_at(step)

    lesson = Lesson(model, router, RouterConfig(), None, PLAN.steps, seed=3)
    try:
        regress_gains(lesson, "tiny", batches, PLAN, ALONE, run, 1.0)
    except RuntimeError:
        assert stop_after
    return router


def test_resumed_equals_uninterrupted(tmp_path):
    whole = _regress(tmp_path / "whole")
    _regress(tmp_path / "parts", stop_after=6)
    resumed = _regress(tmp_path / "parts")
    assert resumed.weight_LCD.equal(whole.weight_LCD)
    assert resumed.bias_LC.equal(whole.bias_LC)
    assert whole.weight_LCD.abs().sum(dim=(1, 2)).min() > 0


@pytest.mark.parametrize("branches", [("skip", "big"), ("skip", "small", "big")])
def test_any_branches_can_be_learnt(tmp_path, branches):
    router = _regress(tmp_path, branches).eval()
    taken = tiny_model()(torch.from_numpy(batch_at(0)), policy=router).routes
    assert set(taken.unique().tolist()) <= {int(Branch[name.upper()]) for name in branches}
