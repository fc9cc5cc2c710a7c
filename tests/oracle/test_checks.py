"""What a search cannot do is refused in a sentence before it starts."""

import pytest
import torch

from duollm import RouteSpace, search_oracle
from duollm.oracle.budgets import Exactly, FlopsShare, OnAverage
from duollm.oracle.reductions import LeafTable, RandomRoutes
from naive_oracle import tiny_model, tiny_tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": "other"}, "context must be one of shared, reference, committed, got 'other'"),
        ({"big_layers": [4]}, "a budget of 4 big layers is impossible here; allowed: 0 .. 3"),
        ({"big_layers": [1, 1]}, "different"),
        ({"big_layers": []}, "one or more"),
        ({"big_layers": [1], "budgets": [Exactly(1)]}, "not both"),
        ({"budgets": [FlopsShare(0.01)]}, "no route costs at most 0.01"),
        ({"budgets": [OnAverage(4)]}, "allowed: 0 .. 3"),
        ({"context": "committed", "budgets": [OnAverage(1)]}, "no budget on average"),
        ({"reference": torch.tensor([2, 2, 2])}, "reference goes with context 'reference', got context 'shared'"),
        (
            {"context": "committed", "reductions": [RandomRoutes(2)]},
            "RandomRoutes does not go with context 'committed'",
        ),
        (
            {"context": "committed", "reductions": [LeafTable(torch.ones(10).bool(), 8)]},
            "LeafTable does not go with context 'committed'",
        ),
        (
            {"method": "greedy"},
            "method must be one of exact, beam, local, sampled or one made with settings, got 'greedy'",
        ),
    ],
)
def test_impossible_searches_are_refused(options, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        search_oracle(tiny_model(), tiny_tokens(), RouteSpace(3), **options)


@pytest.mark.parametrize(
    ("tokens", "space", "message"),
    [
        (torch.tensor([[1, 97]]), RouteSpace(3), "token ids must be in 0 .. 96"),
        (torch.tensor([[1]]), RouteSpace(3), "T >= 2"),
        (torch.zeros(0, 4, dtype=torch.long), RouteSpace(3), "B >= 1"),
        (torch.ones(1, 4), RouteSpace(3), r"a tensor of integers, got torch.float32"),
        ([[1, 2]], RouteSpace(3), "a tensor of integers, got <class 'list'>"),
        (torch.tensor([[1, 2]]), RouteSpace(4), "the route space has 4 layers, the model 3"),
    ],
)
def test_bad_input_is_refused(tokens, space, message):
    with pytest.raises(ValueError, match=message):
        search_oracle(tiny_model(), tokens, space)


def test_dropout_is_refused():
    model = tiny_model()
    model.config.attention_dropout = 0.1
    search_oracle(model, tiny_tokens(1, 3), RouteSpace(3))
    with pytest.raises(ValueError, match=r"without dropout; call model.eval\(\) first"):
        search_oracle(model.train(), tiny_tokens(1, 3), RouteSpace(3))
    model = tiny_model()
    model.model.layers[0].mlp.big.up_proj = torch.nn.Sequential(
        model.model.layers[0].mlp.big.up_proj, torch.nn.Dropout(0.1)
    )
    with pytest.raises(ValueError, match="without dropout"):  # adapters come in training mode
        search_oracle(model, tiny_tokens(1, 3), RouteSpace(3))


def test_attention_to_later_tokens_is_refused():
    model = tiny_model()
    model.config.is_causal = False
    with pytest.raises(ValueError, match=r"needs causal attention: config\.is_causal must be True"):
        search_oracle(model, tiny_tokens(1, 3), RouteSpace(3))


@pytest.mark.parametrize("wrap", [lambda model: model.model, torch.nn.DataParallel], ids=["base model", "DataParallel"])
def test_what_is_no_language_model_is_refused(wrap):
    with pytest.raises(ValueError, match=r"takes a DuoForCausalLM, got .*; give the model inside"):
        search_oracle(wrap(tiny_model()), tiny_tokens(1, 3), RouteSpace(3))


def test_what_would_have_no_effect_in_a_search_is_refused():
    ids, space = tiny_tokens(), RouteSpace(3)
    expected = search_oracle(tiny_model(), ids, space).nll

    def touched(touch):
        model = tiny_model()
        touch(model)
        return search_oracle(model, ids, space).nll

    def nothing(*_):
        return None

    with pytest.raises(ValueError, match=r"lm_head must be an nn.Linear.* got Adapter with"):
        touched(lambda model: setattr(model, "lm_head", type("Adapter", (torch.nn.Linear,), {})(32, 97)))
    with pytest.raises(ValueError, match="merge adapters, do not offload"):
        touched(lambda model: model.lm_head.to("meta"))
    with pytest.raises(ValueError, match="without bias"):
        touched(lambda model: setattr(model, "lm_head", torch.nn.Linear(32, 97)))
    for part in ("model.layers.1", "model.layers.0.self_attn", "model.layers.2.mlp"):

        def override(model, part=part):
            kind = type(model.get_submodule(part))
            model.get_submodule(part).__class__ = type("Mine", (kind,), {"forward": lambda *given: given[1]})

        with pytest.raises(ValueError, match=f"put on {part} would have no effect"):
            touched(override)
    for part in ("model", "model.layers.1", "model.layers.0.self_attn", "model.layers.2.mlp"):
        with pytest.raises(ValueError, match=f"put on {part} would have no effect"):
            touched(lambda model, part=part: model.get_submodule(part).register_forward_hook(nothing))
    # transformers' own recording changes nothing, and what is put on the parts that are called has its effect
    assert touched(lambda model: model(ids, output_hidden_states=True)).equal(expected)
    assert not touched(
        lambda model: model.model.layers[1].mlp.big.register_forward_hook(lambda *given: 2 * given[-1])
    ).equal(expected)
