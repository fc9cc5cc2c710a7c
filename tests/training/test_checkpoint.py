import pytest
import torch

from duollm.errors import UserError
from duollm.training.checkpoint import load_checkpoint, save_checkpoint
from duollm.training.optimizer import TrainingPlan, make_optimizer
from tiny import tiny_model


@pytest.fixture
def saved(tmp_path, model):
    path = tmp_path / "resume" / "tiny.pt"
    save_checkpoint(path, model, make_optimizer(model, TrainingPlan(1, 1, 1.0)), 7, "mine")
    return path


def load(path, identity="mine"):
    model = tiny_model(seed=5)
    return load_checkpoint(path, model, make_optimizer(model, TrainingPlan(1, 1, 1.0)), identity), model


def test_no_checkpoint_means_from_the_start(tmp_path):
    assert load(tmp_path / "none.pt")[0] == 0


def test_a_checkpoint_restores_step_and_weights(saved, model):
    step, restored = load(saved)
    assert step == 7
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in restored.state_dict().items())


def test_a_checkpoint_of_another_training_is_refused(saved):
    with pytest.raises(UserError, match=r"tiny\.pt: belongs to a training with other settings; delete it"):
        load(saved, identity="other")


@pytest.mark.parametrize("length", [0, 10, 1000, -100])
def test_a_truncated_checkpoint_is_refused(saved, length):
    saved.write_bytes(saved.read_bytes()[:length])
    with pytest.raises(UserError, match=r"tiny\.pt: damaged checkpoint .*delete it"):
        load(saved)


@pytest.mark.parametrize("content", [{"step": 1}, [1, 2], {"step": 1, "identity": "mine", "trained": {}}])
def test_a_file_of_something_else_is_refused(saved, content):
    torch.save(content, saved)
    with pytest.raises(UserError, match="damaged checkpoint"):
        load(saved)


def test_a_checkpoint_that_would_run_code_is_refused(saved):
    torch.save({"step": print, "identity": "mine", "trained": {}, "optimizer": {}}, saved)
    with pytest.raises(UserError, match="damaged checkpoint"):
        load(saved)
