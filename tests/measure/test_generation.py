"""What is kept of a generation is what a full forward would say, and its speed leaves out the showing."""

import pytest
import torch
from transformers import GenerationConfig

from duollm.data.tokenizer import train_tokenizer
from duollm.measure import generation
from duollm.measure.generation import generate_traced
from duollm.models.branch import Branch
from duollm.routers.policies import RandomShare
from tiny import random_ids, tiny_model

NEW = 7


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the café of the naïve owl " * 3], 270)


@pytest.fixture
def model(tokenizer):
    return tiny_model(vocab_size=len(tokenizer))


def settings(**changes):
    return GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0, **changes)


@pytest.mark.parametrize("beams", [1, 3])
def test_tokens_and_routes_are_those_of_generate_and_a_full_forward(model, tokenizer, beams):
    prompt_P, policy, shown = random_ids(batch=1)[0], RandomShare(0.5), []
    made = generate_traced(
        model, tokenizer, prompt_P, policy, settings(num_beams=beams), lambda *piece: shown.append(piece)
    )
    whole = model.generate(prompt_P[None], settings(num_beams=beams), policy=policy)
    assert made.tokens_G == whole[0, 9:].tolist()
    routes_TL = model(whole[:, :-1], policy=policy).routes[0]
    assert torch.equal(made.prompt_routes_PL, routes_TL[:9])
    assert torch.equal(made.routes_GL, routes_TL[8:])
    assert len(made.routes_GL) == NEW
    assert "".join(piece for piece, _ in shown) == tokenizer.decode(made.tokens_G, skip_special_tokens=True)
    assert {share for _, share in shown} <= set((made.routes_GL == Branch.BIG).double().mean(1).tolist())


def test_pieces_are_whole_characters_with_the_share_of_their_last_token(tokenizer):
    ids = tokenizer("a 漢é")["input_ids"]
    pieces = []
    trace = generation._Trace(tokenizer, lambda *piece: pieces.append(piece))
    routes_GL = torch.ones(len(ids), 4, dtype=torch.long)
    routes_GL[-1] = Branch.BIG
    trace.show_all(ids, routes_GL)
    assert "".join(text for text, _ in pieces) == "a 漢é"
    assert len(pieces) < len(ids), "the character of three bytes has to be several tokens"
    assert [share for _, share in pieces] == [0.0] * (len(pieces) - 1) + [1.0]


def test_an_unfinished_character_is_shown_at_the_end(tokenizer):
    ids, pieces = tokenizer("a漢")["input_ids"][:-1], []
    trace = generation._Trace(tokenizer, lambda *piece: pieces.append(piece))
    trace.show_all(ids, torch.full((len(ids), 4), int(Branch.BIG)))
    assert pieces == [("a", 1.0)]
    trace.end()
    assert pieces[1:] == [("\N{REPLACEMENT CHARACTER}", 1.0)]


def test_speed_leaves_out_the_prompt_and_the_showing(model, tokenizer, monkeypatch):
    clock = {"now": 0.0}
    monkeypatch.setattr(generation.time, "perf_counter", lambda: clock["now"])

    def forward_takes(module, inputs, output):
        clock["now"] += 100 if output.routes.shape[1] > 1 else 0.5

    def slow_terminal(piece, share):
        clock["now"] += 1000

    model.register_forward_hook(forward_takes)
    made = generate_traced(model, tokenizer, random_ids(batch=1)[0], RandomShare(0.5), settings(), slow_terminal)
    assert made.tokens_per_second == pytest.approx(2)
