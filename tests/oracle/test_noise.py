import pytest
import torch

from duollm import RouteSpace, search_oracle
from duollm.oracle.budgets import Cells
from duollm.oracle.contexts import Batch
from duollm.oracle.noise import OWN_PREDICTION, DrawnLabels, LabelSource, draw_labels
from naive_oracle import tiny_model, tiny_tokens

SPACE = RouteSpace(3)


def draw(pairs, seed=0, source=OWN_PREDICTION):
    """The labels of the predictions at two sequences of three tokens."""
    drawn, batch = DrawnLabels(pairs, source), Batch(tiny_model(), tiny_tokens(2, 4))
    with torch.inference_mode():
        drawn.begin(batch, Cells(SPACE, 8, 48), [], torch.Generator().manual_seed(seed))
    return drawn


def all_big_prediction():
    with torch.no_grad():
        return tiny_model()(tiny_tokens(2, 4)[:, :-1], routes=[2, 2, 2]).logits.softmax(-1).flatten(0, 1)


def test_pairs_by_positions():
    first, second = draw(pairs=5).label_2SN
    assert first.shape == second.shape == (5, 6)
    assert first.dtype == torch.long
    assert not first.equal(second)


def test_the_same_generator_draws_the_same_labels():
    assert draw(4).label_2SN.equal(draw(4).label_2SN)
    assert not draw(4).label_2SN.equal(draw(4, seed=1).label_2SN)


def test_labels_follow_the_all_big_prediction_position_by_position():
    for label_SN in draw(8000).label_2SN:
        frequencies = torch.nn.functional.one_hot(label_SN, 97).float().mean(0)
        torch.testing.assert_close(frequencies, all_big_prediction(), atol=0.03, rtol=0)


@pytest.mark.parametrize(("other", "temperature"), [(None, 0.5), (9, 1.0), (9, 2.0)])
def test_labels_follow_another_prediction_and_their_surprise_stays_the_all_big_one(other, temperature):
    model = None if other is None else tiny_model(num_layers=2, seed=other)
    with torch.no_grad():
        logits_BTV = (model or tiny_model())(tiny_tokens(2, 4)[:, :-1]).logits
    p_NV = (logits_BTV / temperature).softmax(-1).flatten(0, 1)
    drawn = draw(8000, source=LabelSource(model, temperature))
    nll_NV = -all_big_prediction().log()
    for label_SN, excess_SN in zip(drawn.label_2SN, drawn.excess_2SN, strict=True):
        frequencies = torch.nn.functional.one_hot(label_SN, 97).float().mean(0)
        torch.testing.assert_close(frequencies, p_NV, atol=0.03, rtol=0)
        torch.testing.assert_close(excess_SN, nll_NV.T.gather(0, label_SN) - (p_NV * nll_NV).sum(-1))
        torch.testing.assert_close(excess_SN.mean(0), torch.zeros(6), atol=0.1, rtol=0)
    torch.testing.assert_close(drawn.expected_ND, p_NV @ tiny_model().lm_head.weight)


@pytest.mark.parametrize("words", [90, 105])
def test_embeddings_padded_to_other_lengths_do_not_matter(words):
    model, batch = tiny_model(seed=9), Batch(tiny_model(), tiny_tokens(2, 4) % 90)
    model.resize_token_embeddings(words)
    with torch.inference_mode():
        label_2SN, *_ = draw_labels(batch, 2000, torch.Generator().manual_seed(0), LabelSource(model))
    assert label_2SN.max() < min(words, 97)


def test_the_two_draws_of_a_pair_are_independent():
    first, second = draw(8000).label_2SN
    agree_N = (first == second).float().mean(0)
    torch.testing.assert_close(agree_N, all_big_prediction().square().sum(-1), atol=0.03, rtol=0)


def test_excess_is_how_much_more_surprising_the_labels_are_than_expected():
    drawn, p_NV = draw(8000), all_big_prediction()
    for label_SN, excess_SN in zip(drawn.label_2SN, drawn.excess_2SN, strict=True):
        nll_SN = -p_NV.log().T.gather(0, label_SN)
        torch.testing.assert_close(excess_SN, nll_SN - -(p_NV * p_NV.log()).sum(-1))
        torch.testing.assert_close(excess_SN.mean(0), torch.zeros(6), atol=0.1, rtol=0)


def test_in_context_committed_they_meet_the_picks_of_the_true_labels():
    model, tokens, drawn = tiny_model(), tiny_tokens(), DrawnLabels(2)
    committed = search_oracle(model, tokens, SPACE, "committed", [1, 2], reductions=[drawn])
    for k, big in enumerate(committed.big_layers):
        routes = torch.full((2, 6, 3), 2)
        routes[:, :-1] = SPACE.decode(committed.route_ids[k])
        same = search_oracle(model, tokens, SPACE, "reference", [big], reference=routes, reductions=[DrawnLabels(2)])
        for name in ("nll", "resampled_nll", "resampled_score"):
            torch.testing.assert_close(committed.columns[name][k], same.columns[name][0], atol=1e-4, rtol=0)
