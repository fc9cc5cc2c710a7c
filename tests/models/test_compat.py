"""The cache under both of its names, keywords that nobody knows, which logits are kept, nested checkpoints."""

import warnings

import pytest
import torch
from transformers.cache_utils import DynamicCache
from transformers.utils import logging

from duollm.models.branch import Branch
from duollm.models.compat import CACHE
from tiny import random_ids, random_routes, tiny_model

NAMES = ("cache", "past_key_values")


@pytest.fixture
def told(monkeypatch):
    """What transformers says about deprecated names: it logs some and warns of others."""
    said: list[str] = []
    monkeypatch.setattr(type(logging.get_logger("x")), "warning_once", lambda self, *a, **_: said.append(a[0]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lambda: [text for text in (*said, *(str(each.message) for each in caught)) if "deprecated" in text]


@pytest.mark.parametrize("base", [False, True], ids=["language model", "base model"])
@pytest.mark.parametrize("name", NAMES)
def test_a_text_is_read_in_pieces_with_the_cache_under_either_name(told, name, base):
    whole = tiny_model(attention="sdpa", sliding_window=6)
    model, ids = whole.model if base else whole, random_ids()
    first = model(ids[:, :4], **{name: DynamicCache(config=model.config)})
    assert first.cache is first.past_key_values is first["cache"] is first["past_key_values"]
    assert name in first
    second = model(ids[:, 4:], **{name: getattr(first, name)})
    torch.testing.assert_close(second[0], model(ids)[0][:, 4:], atol=1e-5, rtol=1e-5)
    assert second.cache.get_seq_length() == 9
    assert told() == []


@pytest.mark.parametrize("name", NAMES)
def test_the_cache_of_an_output_is_read_and_replaced_under_either_name(told, name):
    output = tiny_model()(random_ids())
    assert output.get(name) is output.cache
    setattr(output, name, "another")
    assert output.cache == output.past_key_values == "another"
    output[name] = "a third"
    assert output.cache == output.past_key_values == output.get(name) == "a third"
    assert told() == []


@pytest.mark.parametrize("name", NAMES)
def test_a_loop_of_ones_own_may_prepare_its_inputs_under_either_name(name):
    model, ids = tiny_model(attention="sdpa"), random_ids()
    mask, cache = torch.ones_like(ids), model(ids[:, :8]).cache
    inputs = model.prepare_inputs_for_generation(ids, **{name: cache}, attention_mask=mask)
    assert {each: value for each, value in inputs.items() if each in NAMES} == {CACHE: cache}


@pytest.mark.parametrize("name", NAMES)
def test_generate_goes_on_with_a_cache_under_either_name(told, name):
    model, ids = tiny_model(attention="sdpa"), random_ids()
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    seen = model(ids[:, :5]).cache
    assert torch.equal(model.generate(ids, **{name: seen}, **settings), model.generate(ids, **settings))
    assert seen.get_seq_length() == 11
    assert told() == []


def test_the_cache_is_given_once():
    caches = {name: DynamicCache() for name in NAMES}
    for call in (tiny_model(), tiny_model().generate):
        with pytest.raises(ValueError, match="two names of one argument"):
            call(random_ids(), **caches)


def test_both_models_return_a_cache_unless_they_train():
    model, ids = tiny_model(), random_ids()
    assert model(ids).cache.get_seq_length() == model.model(ids).cache.get_seq_length() == 9
    assert model(ids, use_cache=False).cache is model.model(ids, use_cache=False).cache is None
    assert model.train()(ids).cache is None


@pytest.mark.parametrize("name", ["past_key_value", "cache_position", "token_type_ids", "output_router_logits"])
def test_a_keyword_that_nobody_knows_is_named(name):
    model = tiny_model()
    for each in (model, model.model):
        with pytest.raises(TypeError, match=rf"{type(each).__name__}.forward\(\) got unexpected .*'{name}'"):
            each(random_ids(), **{name: None})


def test_a_keyword_of_the_loss_is_handed_on():
    model, ids = tiny_model(), random_ids()
    total = model(ids, labels=ids, num_items_in_batch=1).loss
    torch.testing.assert_close(total, model(ids, labels=ids).loss * 16)


def test_a_loss_of_ones_own_may_have_keywords_of_its_own():
    model, ids = tiny_model(), random_ids()
    model.loss_function = lambda logits, labels, vocab_size, scale=1.0: logits.mean() * scale
    loss = model(ids, labels=ids).loss
    torch.testing.assert_close(model(ids, labels=ids, scale=3.0).loss, loss * 3)
    with pytest.raises(TypeError, match="'scales'"):
        model(ids, labels=ids, scales=3.0)


@pytest.mark.parametrize("kept", [slice(2, 5), slice(-3, None), [1, 7]], ids=str)
def test_logits_to_keep_may_be_what_indexes_a_tensor(kept):
    model, ids = tiny_model(), random_ids()
    torch.testing.assert_close(model(ids, logits_to_keep=kept).logits, model(ids).logits[:, kept])


@pytest.mark.parametrize(
    "kept",
    [torch.tensor([[2, 7], [0, 8]]), random_ids() > 12, torch.arange(9) > 3],
    ids=["positions of each row", "mask of each row", "mask"],
)
def test_logits_to_keep_may_differ_by_row(kept):
    model, ids = tiny_model(), random_ids()
    whole, logits = model(ids).logits, model(ids, logits_to_keep=kept).logits
    if kept.ndim == 1:
        expected = whole[:, kept]
    else:
        expected = whole[kept] if kept.dtype == torch.bool else whole.take_along_dim(kept[..., None], 1)
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("kept", [torch.ones(2, 8).bool(), torch.ones(3, 1).long(), torch.ones(9), torch.tensor(1)])
def test_logits_to_keep_of_another_shape_are_refused(kept):
    with pytest.raises(ValueError, match=r"logits_to_keep must be .*\[2, K\].*\[2, 9\], got torch"):
        tiny_model()(random_ids(), logits_to_keep=kept)


class Remembering(torch.nn.Module):
    """A soft router whose memory is nested and carries gradients from layer to layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.score = torch.nn.Linear(19, len(Branch))

    def begin(self, position_ids_BT):
        return {"seen": [torch.zeros(*position_ids_BT.shape, 3)], "layers": 0}

    def __call__(self, layer_idx, states_BTD, memory):
        weights_BTC = self.score(torch.cat([states_BTD, memory["seen"][0]], -1)).softmax(-1)
        return weights_BTC, {"seen": [memory["seen"][0] + weights_BTC], "layers": memory["layers"] + 1}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
def test_gradients_flow_through_a_nested_memory_under_checkpointing(reentrant):
    model, ids, router = tiny_model(skip_scope="layer").train(), random_ids(), Remembering()
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        output = model(ids, labels=ids, policy=router, use_cache=False)
        (output.loss + torch.stack(output.choices)[..., Branch.BIG].square().mean()).backward()
        named = [*model.named_parameters(), *router.named_parameters()]
        found.append({name: each.grad.clone() for name, each in named})
        model.zero_grad()
        router.zero_grad()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
def test_no_cache_is_filled_twice_under_checkpointing():
    model, ids, cache = tiny_model().train(), random_ids(), DynamicCache()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(ids, labels=ids, cache=cache, routes=random_routes()).loss.backward()
    assert cache.get_seq_length() == 0
