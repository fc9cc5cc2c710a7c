import pytest
import torch

from duollm.training import next_token
from duollm.training.next_token import next_token_loss, nll_and_gradient
from tiny import random_ids, tiny_model


@pytest.mark.parametrize("rows", [1, 5, 100])
@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_are_those_of_the_models_own_forward(monkeypatch, rows, tied):
    """Blocks of one row, of rows that do not divide the 22, and one block for all."""
    model, ids = tiny_model(tie_word_embeddings=tied), random_ids(batch=2, tokens=12)
    monkeypatch.setitem(next_token._BLOCKS, "cpu", rows * model.config.vocab_size)
    monkeypatch.setattr(next_token, "_ROWS", 1)
    expected = model(ids, labels=ids).loss
    (2 * expected).backward()
    wanted = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    loss = next_token_loss(model, model.model(ids).last_hidden_state, ids, nll_and_gradient)
    (2 * loss).backward()
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-6, rtol=1e-5, msg=name)


def test_bf16_keeps_the_gradient_of_a_token_that_is_almost_certain():
    """A probability near 1 rounds to 1 in bf16; its distance from 1 must not."""
    logits, labels = torch.tensor([[8.0, 0.0, 0.0]]), torch.tensor([0])
    nll, weights, scale = nll_and_gradient(logits.bfloat16(), labels)
    wanted = torch.softmax(logits, -1) - torch.tensor([[1.0, 0.0, 0.0]])
    torch.testing.assert_close((weights * scale).float(), wanted, rtol=0.01, atol=0)
    torch.testing.assert_close(nll, torch.nn.functional.cross_entropy(logits, labels))


def test_a_frozen_head_gets_no_gradient():
    model, ids = tiny_model(tie_word_embeddings=False), random_ids()
    model.lm_head.requires_grad_(False)
    next_token_loss(model, model.model(ids).last_hidden_state, ids, nll_and_gradient).backward()
    assert model.lm_head.weight.grad is None
    assert model.model.embed_tokens.weight.grad is not None
