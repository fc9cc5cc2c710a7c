"""transformers' Trainer with evaluation and prediction."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from duollm.models.branch import Branch
from tiny import random_ids, tiny_model

pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")


@pytest.mark.parametrize("skip_scope", ["ffn", "layer"])
def test_training_evaluates_and_predicts(tmp_path, skip_scope):
    model, ids = tiny_model(skip_scope=skip_scope), random_ids(4)
    model.attach(lambda layer, states, memory: (torch.arange(9).expand(states.shape[:2]) % len(Branch), None))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    first, second = [each["eval_loss"] for each in trainer.state.log_history if "eval_loss" in each]
    assert second < first
    assert trainer.evaluate()["eval_loss"] == pytest.approx(second)
    model.eval()
    torch.testing.assert_close(torch.tensor(trainer.predict(rows).predictions), model(ids).logits, atol=1e-5, rtol=1e-5)
