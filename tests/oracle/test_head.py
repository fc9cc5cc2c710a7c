from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from duollm.oracle.head import HeadBound, log_normaliser

WORDS, WIDTH, TOKENS = 23, 5, 4


def model_with(weight_VD):
    """A head, which is all that is read of the model."""
    return SimpleNamespace(lm_head=SimpleNamespace(weight=weight_VD))


@st.composite
def cases(draw):
    """A random head, reference states near or far from the states that are bounded, and those states."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    scale = draw(st.sampled_from([0.1, 1.0, 5.0]))
    distance = draw(st.sampled_from([0.0, 0.1, 3.0]))
    weight_VD = scale * torch.randn(WORDS, WIDTH, generator=generator)
    reference_ND = torch.randn(TOKENS, WIDTH, generator=generator)
    states_PND = reference_ND + distance * torch.randn(3, TOKENS, WIDTH, generator=generator)
    return model_with(weight_VD), reference_ND, states_PND


def exact(model, states_PND):
    return (states_PND.double() @ model.lm_head.weight.double().T).logsumexp(-1)


@given(case=cases())
def test_log_normaliser_is_the_log_of_the_sum(case):
    model, _, states_PND = case
    found = log_normaliser(model, states_PND.flatten(0, 1))
    torch.testing.assert_close(found.double(), exact(model, states_PND).flatten(), atol=1e-5, rtol=1e-5)


def test_log_normaliser_in_blocks_is_the_same(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    model, states = model_with(torch.randn(WORDS, WIDTH, generator=generator)), torch.randn(9, WIDTH)
    whole = log_normaliser(model, states)
    monkeypatch.setattr("duollm.oracle.head._BLOCK_BYTES", 4 * WORDS * 2)
    torch.testing.assert_close(log_normaliser(model, states), whole)


def test_log_normaliser_of_no_states_is_empty():
    assert log_normaliser(model_with(torch.ones(WORDS, WIDTH)), torch.empty(0, WIDTH)).shape == (0,)


@given(case=cases(), words=st.integers(1, WORDS - 1))
def test_the_bound_never_exceeds_the_log_normaliser(case, words):
    model, reference_ND, states_PND = case
    truth = exact(model, states_PND)
    bound = HeadBound.around(model, reference_ND, words)(states_PND)
    assert (bound <= truth + 1e-5 * (1 + truth.abs())).all()


@given(case=cases(), words=st.integers(1, WORDS))
def test_the_closer_bound_sums_over_the_first_words(case, words):
    model, reference_ND, states_PND = case
    bound, states_MD = HeadBound.around(model, reference_ND), states_PND.flatten(0, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("duollm.oracle.head._WORDS", words)
        found_M = bound.closer(model, states_MD)
    first = model_with(model.lm_head.weight[:words])
    torch.testing.assert_close(found_M.double(), exact(first, states_MD), atol=1e-5, rtol=1e-5)


@given(case=cases(), words=st.integers(1, WORDS + 5))
def test_it_is_exact_at_the_reference_itself(case, words):
    model, reference_ND, _ = case
    bound = HeadBound.around(model, reference_ND, words)(reference_ND[None])
    torch.testing.assert_close(bound.double(), exact(model, reference_ND[None]), atol=1e-4, rtol=1e-5)


@given(case=cases())
def test_it_is_exact_everywhere_if_one_word_is_left_over(case):
    model, reference_ND, states_PND = case
    bound = HeadBound.around(model, reference_ND, WORDS - 1)(states_PND)
    torch.testing.assert_close(bound.double(), exact(model, states_PND), atol=1e-4, rtol=1e-5)


def test_it_is_not_trivial():
    """Away from the reference it is below, and more words bring it closer."""
    generator = torch.Generator().manual_seed(0)
    model = model_with(torch.randn(WORDS, WIDTH, generator=generator))
    reference_ND = torch.randn(TOKENS, WIDTH, generator=generator)
    states_PND = reference_ND + 0.5 * torch.randn(50, TOKENS, WIDTH, generator=generator)
    gaps = [(exact(model, states_PND) - HeadBound.around(model, reference_ND, n)(states_PND)).mean() for n in (2, 12)]
    assert 1e-3 < gaps[1] < gaps[0] < 1


@pytest.mark.parametrize("block_bytes", [4 * WORDS, 4 * WORDS * 3])
def test_it_is_built_in_blocks_and_read_by_rows(monkeypatch, block_bytes):
    generator = torch.Generator().manual_seed(0)
    model = model_with(torch.randn(WORDS, WIDTH, generator=generator))
    reference_ND, states_PND = torch.randn(TOKENS, WIDTH), torch.randn(3, TOKENS, WIDTH)
    whole = HeadBound.around(model, reference_ND, 4)
    monkeypatch.setattr("duollm.oracle.head._BLOCK_BYTES", block_bytes)
    torch.testing.assert_close(HeadBound.around(model, reference_ND, 4)(states_PND), whole(states_PND))
    rows = torch.tensor([2, 0])
    torch.testing.assert_close(whole.rows(rows)(states_PND[:, rows]), whole(states_PND)[:, rows])


def test_the_log_normaliser_of_words_read_in_parts(monkeypatch):
    weight_VD, hidden_MD = torch.randn(WORDS, WIDTH), torch.randn(7, WIDTH)
    monkeypatch.setattr("duollm.oracle.head._WORDS", 10)
    monkeypatch.setattr("duollm.oracle.head._BLOCK_BYTES", 4 * 10 * 3)  # three rows at a time
    found_M = log_normaliser(model_with(weight_VD), hidden_MD)
    torch.testing.assert_close(found_M, (hidden_MD @ weight_VD.T).logsumexp(-1))
