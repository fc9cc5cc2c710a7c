"""Generation with a cache equals running the whole text again for every token, whatever chooses the branches."""

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import CompileConfig, ContinuousBatchingConfig, GenerationConfig
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS
from transformers.generation.streamers import BaseStreamer

from duollm.models.branch import Branch
from duollm.models.generation import check_cached_decoding
from duollm.models.modeling_duo import DuoForCausalLM
from duollm.models.policy import FixedRoutes
from duollm.routers.policies import RandomShare, parse_policy
from duollm.routers.registry import make_router
from tiny import random_ids, tiny_model

NEW = 6
ROUTE = torch.tensor([Branch.SMALL, Branch.SKIP, Branch.BIG])
KINDS = ["full_attention", "sliding_attention", "full_attention"]
SETTINGS = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}


class BySign:
    """Every branch by the states alone, with a memory of the layer before: a router with a will of its own."""

    def __call__(self, layer_idx, states_BTD, memory):
        weight_DC = torch.randn(states_BTD.shape[-1], 3, generator=torch.Generator().manual_seed(layer_idx))
        scores_BTC = states_BTD @ weight_DC
        if memory is not None:
            scores_BTC = scores_BTC - torch.nn.functional.one_hot(memory, 3)
        choice_BT = scores_BTC.argmax(-1)
        return choice_BT, choice_BT


def linear(model: DuoForCausalLM):
    """A hard linear router with random weights."""
    router = make_router("linear", model.config, ["small", "big"]).eval()
    generator = torch.Generator().manual_seed(3)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return router


CHOOSERS = {
    "route": lambda model: {"routes": ROUTE},
    "named pattern": lambda model: {"policy": parse_policy("spread:2", model)},
    "linear router": lambda model: {"policy": linear(model)},
    "policy with memory": lambda model: {"policy": BySign()},
    "policy with positions": lambda model: {"policy": RandomShare(0.5)},
}


@pytest.fixture(params=CHOOSERS.values(), ids=CHOOSERS.keys())
def choose(request):
    return request.param


@pytest.fixture(params=["ffn", "layer"])
def model(request):
    return tiny_model(skip_scope=request.param, attention="sdpa")


def greedy(model: DuoForCausalLM, ids: Tensor, **inputs: object) -> Tensor:
    """The most likely continuation, without a cache."""
    for _ in range(NEW):
        logits = model(ids, use_cache=False, **inputs).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids


def padded(ids_BT: Tensor, padding: int) -> tuple[Tensor, Tensor]:
    """The same text behind `padding` other tokens, and the mask that hides them."""
    noise = torch.full((len(ids_BT), padding), 7)
    longer = torch.cat([noise, ids_BT], 1)
    return longer, (torch.arange(longer.shape[1]) >= padding).long().expand_as(longer).contiguous()


def test_greedy_decoding_is_the_argmax_of_uncached_forwards(model, choose):
    ids, chosen = random_ids(), choose(model)
    made = model.generate(ids, **chosen, **SETTINGS)
    assert torch.equal(made, greedy(model, ids, **chosen))
    assert not torch.equal(made, greedy(model, ids))


def test_the_choices_made_while_decoding_are_those_of_a_full_forward(model, choose):
    ids, chosen, taken = random_ids(), choose(model), []
    listening = model.register_forward_hook(lambda model, inputs, output: taken.append(output))
    made = model.generate(ids, **chosen, **SETTINGS)
    listening.remove()
    whole = model(made[:, :-1], **chosen)
    assert [output.logits.shape[1] for output in taken[1:]] == [1] * (NEW - 1)
    assert torch.equal(torch.cat([output.routes for output in taken], 1), whole.routes)
    last = torch.cat([output.logits[:, -1:] for output in taken], 1)
    torch.testing.assert_close(last, whole.logits[:, -NEW:], atol=1e-4, rtol=1e-4)


def test_an_attached_policy_is_in_force(model, choose):
    ids, chosen = random_ids(), choose(model)
    expected = model.generate(ids, **chosen, **SETTINGS)
    model.attach(chosen.get("policy") or FixedRoutes(chosen["routes"]))
    assert torch.equal(model.generate(ids, **SETTINGS), expected)


def test_a_row_is_the_same_whatever_its_neighbours(model, choose):
    ids, chosen = random_ids(batch=3), choose(model)
    together = model(ids, **chosen)
    for row in range(3):
        alone = model(ids[row : row + 1], **chosen)
        assert torch.equal(alone.routes, together.routes[row : row + 1])
        torch.testing.assert_close(alone.logits, together.logits[row : row + 1], atol=1e-5, rtol=1e-5)


def test_left_padding_changes_neither_logits_nor_routes(model, choose):
    """The mask alone says where a text begins: positions follow from it."""
    ids, chosen = random_ids(), choose(model)
    longer, mask = padded(ids, 4)
    plain, behind = model(ids, **chosen), model(longer, attention_mask=mask, **chosen)
    assert torch.equal(plain.routes, behind.routes[:, 4:])
    torch.testing.assert_close(plain.logits, behind.logits[:, 4:], atol=1e-5, rtol=1e-5)


def test_rows_of_a_left_padded_batch_are_those_generated_alone(model, choose):
    short, long, chosen = random_ids(batch=1, tokens=5), random_ids(batch=1, tokens=9, seed=5), choose(model)
    behind, mask = padded(short, 4)
    mask = torch.cat([mask, torch.ones_like(long)])
    made = model.generate(torch.cat([behind, long]), attention_mask=mask, **chosen, **SETTINGS)
    assert torch.equal(made[:1, 4:], model.generate(short, **chosen, **SETTINGS))
    assert torch.equal(made[1:], model.generate(long, **chosen, **SETTINGS))


def test_beams_keep_their_own_cache(model, choose):
    ids, chosen = random_ids(), choose(model)
    beams = {**chosen, **SETTINGS, "num_beams": 3}
    made = model.generate(ids, **beams)
    assert torch.equal(made, model.generate(ids, **beams, use_cache=False))
    assert torch.equal(made, torch.cat([model.generate(ids[row : row + 1], **beams) for row in range(2)]))


def test_samples_with_a_seed_are_those_without_a_cache(model, choose):
    ids, chosen = random_ids(), choose(model)
    sampled = {**chosen, **SETTINGS, "do_sample": True, "top_k": 0, "num_return_sequences": 3}
    torch.manual_seed(1)
    made = model.generate(ids, **sampled)
    torch.manual_seed(1)
    assert torch.equal(made, model.generate(ids, **sampled, use_cache=False))
    assert len(made.unique(dim=0)) == 6


def test_tokens_stream_as_they_are_made(model, choose):
    class Heard(BaseStreamer):
        def __init__(self):
            self.pieces, self.ended = [], False

        def put(self, value):
            self.pieces.append(value.flatten().tolist())

        def end(self):
            self.ended = True

    ids, chosen, heard = random_ids(batch=1), choose(model), Heard()
    made = model.generate(ids, **chosen, **SETTINGS, streamer=heard)
    assert heard.pieces == [ids[0].tolist(), *([token] for token in made[0, 9:].tolist())]
    assert heard.ended


def test_a_generation_config_may_come_along(model):
    ids = random_ids()
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    assert torch.equal(
        model.generate(ids, config, routes=ROUTE.tolist()), model.generate(ids, routes=ROUTE, **SETTINGS)
    )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_of_a_text_read_in_pieces_are_those_of_the_whole(attention):
    model, ids = tiny_model(skip_scope="layer", attention=attention), random_ids()
    first = model(ids[:, :4], routes=ROUTE, use_cache=True)
    second = model(ids[:, 4:], routes=ROUTE, past_key_values=first.past_key_values)
    pieces = torch.cat([first.logits, second.logits], dim=1)
    torch.testing.assert_close(pieces, model(ids, routes=ROUTE).logits, atol=1e-5, rtol=1e-5)


def test_a_padded_text_read_in_pieces_keeps_its_positions():
    model, policy = tiny_model(), RandomShare(0.5)
    longer, mask = padded(random_ids(), 3)
    first = model(longer[:, :5], attention_mask=mask[:, :5], policy=policy, use_cache=True)
    second = model(longer[:, 5:], attention_mask=mask, policy=policy, past_key_values=first.past_key_values)
    whole = model(longer, attention_mask=mask, policy=policy)
    assert torch.equal(torch.cat([first.routes, second.routes], 1)[:, 3:], whole.routes[:, 3:])
    torch.testing.assert_close(second.logits, whole.logits[:, 5:], atol=1e-5, rtol=1e-5)


def test_routes_of_single_tokens_are_refused_because_they_end_with_the_prompt():
    model, ids = tiny_model(), random_ids()
    with pytest.raises(ValueError, match=r"routes of shape \[L\].*give a policy"):
        model.generate(ids, routes=ROUTE.expand(2, 9, 3), **SETTINGS)


def decode(model: DuoForCausalLM, ids: Tensor, **settings: object) -> Tensor:
    return model.generate(ids, **SETTINGS, **settings)


# Those that need a GPU or another package are left out, and so is what a version has under two names.
CACHES = [name for name in ALL_CACHE_IMPLEMENTATIONS if "offloaded" not in name and name != "quantized"]


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("sizes", [{}, {"sliding_window": 4}, {"layer_types": KINDS, "sliding_window": 4}], ids=str)
def test_every_cache_gives_the_same_text(choose, name, sizes):
    model, ids = tiny_model(skip_scope="layer", attention="sdpa", **sizes), random_ids()
    longer, mask = padded(ids, 3)
    chosen = choose(model)
    plain = decode(model, longer, attention_mask=mask, use_cache=False, **chosen)
    assert torch.equal(decode(model, longer, attention_mask=mask, cache_implementation=name, **chosen), plain)


def test_a_static_cache_is_compiled_only_for_one_branch_per_layer(monkeypatch):
    model, ids, calls = tiny_model(attention="sdpa"), random_ids(), []
    compile_config = CompileConfig(backend="eager", fullgraph=True)
    compile_config._compile_all_devices = True
    settings = {"cache_implementation": "static", "compile_config": compile_config}
    plain, routed = decode(model, ids), decode(model, ids, routes=ROUTE)
    compiled = model.get_compiled_call
    monkeypatch.setattr(model, "get_compiled_call", lambda config: calls.append(config) or compiled(config))
    assert torch.equal(decode(model, ids, routes=ROUTE, **settings), routed)
    assert calls == []
    assert torch.equal(decode(model, ids, **settings), plain)
    assert len(calls) == 1


@pytest.mark.parametrize("drafts", ["assistant", "early exit", "prompt lookup"])
def test_drafts_change_nothing(model, choose, drafts):
    ids, chosen = random_ids(batch=1), choose(model)
    assistant = tiny_model(seed=3, num_hidden_layers=2, attention="sdpa")
    assistant.attach(lambda layer, states, memory: (Branch.SMALL, None))
    how = {
        "assistant": {"assistant_model": assistant},
        "early exit": {"assistant_early_exit": 2},
        "prompt lookup": {"prompt_lookup_num_tokens": 2, "eos_token_id": 30},
    }[drafts]
    plain = {"eos_token_id": 30} if drafts == "prompt lookup" else {}
    assert torch.equal(decode(model, ids, **how, **chosen), decode(model, ids, **plain, **chosen))
    assert model.config.num_hidden_layers == 3


def test_an_assistant_keeps_its_own_policy():
    model, ids, taken = tiny_model(attention="sdpa"), random_ids(batch=1), []
    assistant = tiny_model(seed=3, num_hidden_layers=2, attention="sdpa")
    assistant.register_forward_hook(lambda module, inputs, output: taken.append(output.routes.unique().tolist()))
    decode(model, ids, assistant_model=assistant, policy=FixedRoutes(ROUTE))
    assert {tuple(each) for each in taken} == {(int(Branch.BIG),)}


def test_fewer_layers_are_the_first_ones(model, tmp_path):
    ids, route = random_ids(), ROUTE[:2]
    cut = tiny_model(skip_scope=model.config.skip_scope, num_hidden_layers=2)
    cut.load_state_dict({name: weight for name, weight in model.state_dict().items() if ".layers.2." not in name})
    model.save_pretrained(tmp_path)
    loaded = DuoForCausalLM.from_pretrained(tmp_path, num_hidden_layers=2)
    model.config.num_hidden_layers = 2
    for each in (model, loaded):
        torch.testing.assert_close(each(ids, routes=route).logits, cut(ids, routes=route).logits, atol=1e-5, rtol=1e-5)
    loaded.save_pretrained(tmp_path / "cut")
    assert DuoForCausalLM.from_pretrained(tmp_path / "cut").config.layer_types == ["full_attention"] * 2


def test_embeddings_may_begin_a_text(model, choose):
    ids, chosen = random_ids(), choose(model)
    made = model.generate(inputs_embeds=model.model.embed_tokens(ids), **chosen, **SETTINGS)
    assert torch.equal(made, decode(model, ids, **chosen)[:, 9:])


@pytest.mark.parametrize("sizes", [{}, {"layer_types": KINDS, "sliding_window": 4}], ids=str)
def test_continuous_batching_gives_the_same_texts(sizes):
    if sizes and Version(transformers.__version__) < Version("5.16"):
        pytest.skip("transformers' continuous batching forgot part of a sliding window, for every model")
    model, ids = tiny_model(skip_scope="layer", attention="sdpa", **sizes), random_ids()
    model.attach(RandomShare(0.5))
    prompts = [ids[0].tolist(), ids[1, :5].tolist()]
    expected = [decode(model, torch.tensor([prompt]))[0, len(prompt) :].tolist() for prompt in prompts]
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=-1)
    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
    made = model.generate_batch(prompts, generation_config=config, continuous_batching_config=small, progress_bar=False)
    assert [output.generated_tokens for output in made.values()] == expected


class ForgetfulForCausalLM(DuoForCausalLM):
    """What a release of transformers that renames the cache makes of a model: every step starts an empty one."""

    def forward(self, *args, cache=None, past_key_values=None, **kwargs):
        return super().forward(*args, **kwargs)


def test_the_installed_version_decodes_with_a_cache_as_without():
    model = tiny_model()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    check_cached_decoding(type(model))
    assert torch.equal(torch.rand(2), expected)  # the random state is left alone


def test_a_version_that_does_not_is_refused_in_one_line():
    model, ids = ForgetfulForCausalLM(tiny_model().config), random_ids()
    with pytest.raises(RuntimeError, match=r"^with transformers \S+ generating with a cache differs .*pip install.*$"):
        model.generate(ids, max_new_tokens=2, pad_token_id=0)
    assert model.generate(ids, max_new_tokens=2, pad_token_id=0, use_cache=False).shape == (len(ids), ids.shape[1] + 2)
