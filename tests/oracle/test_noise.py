import pytest
import torch

from duollm import RouteSpace
from duollm.oracle.noise import Resampling
from naive_oracle import tiny_model, tiny_tokens

SPACE = RouteSpace(3)


def draw(source, pairs, tokens=None, seed=0):
    model = tiny_model()
    input_ids = tiny_tokens(2, 3) if tokens is None else tokens
    generator = torch.Generator().manual_seed(seed)
    drawn = Resampling(pairs, source).draw(model, input_ids, SPACE, generator)
    return drawn.first_SN, drawn.second_SN


def frequencies(labels_SN):
    return torch.nn.functional.one_hot(labels_SN, 97).float().mean(0)


@pytest.mark.parametrize("source", ["all-big", "mean"])
def test_pairs_by_positions(source):
    first, second = draw(source, pairs=5)
    assert first.shape == second.shape == (5, 6)
    assert first.dtype == torch.long
    assert not first.equal(second)


def test_the_same_generator_draws_the_same_labels():
    for one, other in zip(draw("mean", 4), draw("mean", 4), strict=True):
        assert one.equal(other)


def test_labels_follow_the_given_probabilities_position_by_position():
    probabilities = torch.zeros(2, 3, 97)
    probabilities[..., 5], probabilities[..., 9] = 0.25, 0.75
    probabilities[1, 2] = 0
    probabilities[1, 2, 40] = 1
    for labels in draw(probabilities, pairs=4000):
        found = frequencies(labels)
        torch.testing.assert_close(found, probabilities.flatten(0, 1), atol=0.04, rtol=0)


def test_the_two_draws_of_a_pair_are_independent():
    uniform = torch.zeros(2, 3, 97)
    uniform[..., :2] = 0.5
    first, second = draw(uniform, pairs=4000)
    assert (first == second).float().mean() == pytest.approx(0.5, abs=0.02)


def test_all_big_is_the_prediction_of_the_model_with_all_layers_big():
    tokens = tiny_tokens(2, 3)
    with torch.no_grad():
        expected = tiny_model()(tokens, routes=[2, 2, 2]).logits.softmax(-1).flatten(0, 1)
    torch.testing.assert_close(frequencies(draw("all-big", 8000, tokens)[0]), expected, atol=0.03, rtol=0)


def test_probabilities_of_the_wrong_shape_are_refused():
    with pytest.raises(ValueError, match=r"probabilities must have shape \[2, 3, 97\], got \[2, 4, 97\]"):
        draw(torch.ones(2, 4, 97), pairs=1)


def test_an_unknown_source_is_refused():
    with pytest.raises(ValueError, match="source must be 'all-big', 'mean' or probabilities, got 'all-small'"):
        draw("all-small", pairs=1)
