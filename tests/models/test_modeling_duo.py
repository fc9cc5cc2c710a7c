"""The model against transformers' Llama, its two executions against each other, and skip against plain loops."""

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from duollm.models.branch import Branch
from duollm.models.dispatch import Dispatch
from duollm.models.modeling_duo import DuoForCausalLM
from tiny import SIZES, random_ids, random_routes, tiny_model

SKIP, SMALL, BIG = Branch


class Recorder:
    """Policy of fixed routes that keeps what it was shown; its memory counts the layers."""

    def __init__(self, routes_BTL: Tensor) -> None:
        self.routes_BTL, self.states, self.memories = routes_BTL, [], []

    def __call__(self, layer_idx, states_BTD, memory):
        self.states.append(states_BTD)
        self.memories.append(memory)
        return self.routes_BTL[..., layer_idx], layer_idx


def dense_twin(duo: DuoForCausalLM, attention: str) -> LlamaForCausalLM:
    """A Llama with the duo's weights, its big FFNs for FFNs."""
    duo_only = {"small_intermediate_size", "skip_scope"}
    sizes = {key: getattr(duo.config, key) for key in (SIZES.keys() | {"head_dim", "tie_word_embeddings"}) - duo_only}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, rms_norm_eps=duo.config.rms_norm_eps)).eval()
    weights = {name.replace("mlp.big.", "mlp."): value for name, value in duo.state_dict().items()}
    llama.load_state_dict({name: value for name, value in weights.items() if "mlp.small" not in name})
    llama.set_attn_implementation(attention)
    return llama


def gradients(model: DuoForCausalLM, **inputs: object) -> dict[str, Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "sizes",
    [{"num_key_value_heads": 4}, {"num_key_value_heads": 2}, {"tie_word_embeddings": False}, {"head_dim": 6}],
    ids=["MHA", "GQA", "untied", "wide heads"],
)
class TestAllBigIsLlama:
    def test_logits_and_loss(self, sizes, attention):
        duo = tiny_model(attention=attention, **sizes)
        llama, ids = dense_twin(duo, attention), random_ids()
        labels = ids.clone()
        labels[0, :3] = -100
        ours, theirs = duo(ids, labels=labels), llama(ids, labels=labels)
        torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.loss, theirs.loss)

    def test_left_padding(self, sizes, attention):
        duo = tiny_model(attention=attention, **sizes)
        ids, mask = random_ids(), torch.ones(2, 9, dtype=torch.long)
        mask[0, :4] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        padded = {"attention_mask": mask, "position_ids": positions}
        ours, theirs = duo(ids, **padded).logits, dense_twin(duo, attention)(ids, **padded).logits
        torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours[0, 4:], duo(ids[:1, 4:]).logits[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("skip_scope", ["ffn", "layer"])
class TestExecutions:
    @pytest.mark.parametrize("routes", [random_routes(), torch.tensor([SMALL, SKIP, BIG])], ids=["BTL", "L"])
    def test_sparse_equals_reference_in_outputs_and_gradients(self, skip_scope, routes):
        model, ids = tiny_model(skip_scope=skip_scope), random_ids()
        sparse, reference = (model(ids, routes=routes, execution=how).logits for how in ("sparse", "reference"))
        torch.testing.assert_close(sparse, reference, atol=1e-5, rtol=1e-5)
        of_sparse, of_reference = (
            gradients(model, input_ids=ids, labels=ids, routes=routes, execution=how) for how in ("sparse", "reference")
        )
        assert of_sparse.keys() <= of_reference.keys()  # a branch that nobody took has no gradient
        for name, gradient in of_reference.items():
            got = of_sparse.get(name, torch.zeros_like(gradient))
            torch.testing.assert_close(
                got, gradient, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
            )

    def test_sparse_equals_reference_under_bf16_autocast(self, skip_scope):
        model, ids, routes = tiny_model(skip_scope=skip_scope), random_ids(), random_routes()
        exact = model(ids, routes=routes).logits
        with torch.autocast("cpu", torch.bfloat16):
            sparse, reference = (model(ids, routes=routes, execution=how).logits for how in ("sparse", "reference"))
        assert (sparse - reference).abs().max() < 0.02 * exact.abs().max()
        assert (sparse - exact).abs().max() < 0.05 * exact.abs().max()

    def test_one_hot_weights_are_hard_choices(self, skip_scope):
        model, ids, routes = tiny_model(skip_scope=skip_scope), random_ids(), random_routes()
        one_hot = torch.nn.functional.one_hot(routes, 3).float()
        soft = model(ids, policy=lambda layer, states, memory: (one_hot[:, :, layer], None))
        hard = model(ids, routes=routes)
        torch.testing.assert_close(soft.logits, hard.logits, atol=1e-5, rtol=1e-5)
        assert torch.equal(soft.routes, hard.routes)

    def test_a_dispatch_is_a_choice(self, skip_scope):
        model, ids, routes = tiny_model(skip_scope=skip_scope), random_ids(), random_routes()
        grouped = model(ids, policy=lambda layer, states, memory: (Dispatch.from_choice(routes[..., layer]), None))
        assert torch.equal(grouped.logits, model(ids, routes=routes).logits)
        assert torch.equal(grouped.routes, routes)

    def test_each_token_is_computed_as_a_plain_loop_would(self, skip_scope):
        model, ids, routes = tiny_model(skip_scope=skip_scope), random_ids(), random_routes()
        expected = torch.stack([naive_logits(model, *row) for row in zip(ids, routes, strict=True)])
        torch.testing.assert_close(model(ids, routes=routes).logits, expected, atol=1e-4, rtol=1e-4)

    def test_equal_tokens_may_share_a_route_without_batch_and_time(self, skip_scope):
        model, ids, route = tiny_model(skip_scope=skip_scope), random_ids(), torch.tensor([BIG, SMALL, SKIP])
        output = model(ids, routes=route)
        expanded = route.expand(2, 9, 3)
        torch.testing.assert_close(output.logits, model(ids, routes=expanded).logits, atol=1e-5, rtol=1e-5)
        assert torch.equal(output.routes, expanded)

    def test_rows_do_not_depend_on_their_neighbours(self, skip_scope):
        model, ids, routes = tiny_model(skip_scope=skip_scope), random_ids(batch=3), random_routes(batch=3)
        alone = torch.cat([model(ids[row : row + 1], routes=routes[row : row + 1]).logits for row in range(3)])
        torch.testing.assert_close(model(ids, routes=routes).logits, alone, atol=1e-5, rtol=1e-5)

    @pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
    def test_gradient_checkpointing_changes_no_gradient(self, skip_scope):
        model, ids, routes = tiny_model(skip_scope=skip_scope), random_ids(), random_routes()
        inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
        recorders = [Recorder(routes), Recorder(routes)]
        model.train()
        plain = gradients(model, **inputs, policy=recorders[0])
        model.gradient_checkpointing_enable()
        checkpointed = gradients(model, **inputs, policy=recorders[1])
        assert len(recorders[1].states) == 2 * len(recorders[0].states)  # every layer ran again
        assert plain.keys() == checkpointed.keys()
        for name, gradient in plain.items():
            torch.testing.assert_close(checkpointed[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def naive_logits(model: DuoForCausalLM, ids_T: Tensor, routes_TL: Tensor) -> Tensor:
    """Token by token, head by head, straight from the definition; logits [T, V]."""
    hidden_TD = model.model.embed_tokens(ids_T)
    cos, sin = (table[0] for table in model.model.rotary_emb(hidden_TD, position_ids=torch.arange(len(ids_T))[None]))
    for layer, choice_T in zip(model.model.layers, routes_TL.T.tolist(), strict=True):
        normed_TD = layer.input_layernorm(hidden_TD)
        rows = []
        for position, (hidden_D, choice) in enumerate(zip(hidden_TD, choice_T, strict=True)):
            skips_layer = choice == SKIP and model.config.skip_scope == "layer"
            if not skips_layer:  # it is attended to all the same
                hidden_D = hidden_D + naive_attention(layer.self_attn, normed_TD, position, cos, sin)
            if choice != SKIP:
                branch = layer.mlp.small if choice == SMALL else layer.mlp.big
                hidden_D = hidden_D + branch(layer.post_attention_layernorm(hidden_D))
            rows.append(hidden_D)
        hidden_TD = torch.stack(rows)
    return model.lm_head(model.model.norm(hidden_TD))


def naive_attention(attention, normed_TD: Tensor, position: int, cos: Tensor, sin: Tensor) -> Tensor:
    """What the token at `position` takes from itself and those before it, [D]."""

    def heads(projection, at: int) -> Tensor:
        return projection(normed_TD[at]).view(-1, attention.head_dim)

    def turned(projection, at: int) -> Tensor:
        rows_Hd = heads(projection, at)
        first, second = rows_Hd.chunk(2, dim=-1)
        return rows_Hd * cos[at] + torch.cat([-second, first], dim=-1) * sin[at]

    mixed = []
    for head, query_d in enumerate(turned(attention.q_proj, position)):
        shared = head // attention.num_key_value_groups
        scores = [
            query_d @ turned(attention.k_proj, at)[shared] / attention.head_dim**0.5 for at in range(position + 1)
        ]
        weights = torch.stack(scores).softmax(0)
        mixed.append(sum(weights[at] * heads(attention.v_proj, at)[shared] for at in range(position + 1)))
    return attention.o_proj(torch.cat(mixed))


class TestInterface:
    def test_without_routes_all_is_big(self):
        model, ids = tiny_model(), random_ids()
        assert torch.equal(model(ids).logits, model(ids, routes=torch.full((3,), int(BIG))).logits)
        assert (model(ids).routes == BIG).all()

    def test_routes_change_the_outcome(self):
        model, ids = tiny_model(), random_ids()
        outcomes = [model(ids, routes=torch.full((3,), int(branch))).logits for branch in Branch]
        assert all((a - b).abs().max() > 0.1 for a, b in [outcomes[:2], outcomes[1:], outcomes[::2]])

    def test_an_attached_policy_is_the_default_and_routes_win_over_it(self):
        model, ids, routes = tiny_model(), random_ids(), random_routes()
        parameters = sum(1 for _ in model.parameters())
        assert model.attach(torch.nn.Identity()) is model
        assert sum(1 for _ in model.parameters()) == parameters
        model.attach(Recorder(routes))
        assert torch.equal(model(ids).routes, routes)
        assert (model(ids, routes=[SMALL] * 3).routes == SMALL).all()
        assert (model.attach(None)(ids).routes == BIG).all()

    def test_a_policy_with_begin_starts_from_what_it_returned(self):
        recorder = Recorder(random_routes(2, 5))
        recorder.begin = lambda position_ids_BT: position_ids_BT
        positions = torch.arange(3, 8).expand(2, 5)
        tiny_model()(random_ids(2, 5), position_ids=positions, policy=recorder)
        assert torch.equal(recorder.memories[0], positions)

    @pytest.mark.parametrize("skip_scope", ["ffn", "layer"])
    def test_a_policy_sees_what_it_chooses_for_and_its_own_memory(self, skip_scope):
        model, ids, routes = tiny_model(skip_scope=skip_scope), random_ids(), random_routes()
        recorder = Recorder(routes)
        first = model.model.layers[0]
        seen = {}
        norm = first.post_attention_layernorm if skip_scope == "ffn" else first.input_layernorm
        norm.register_forward_hook(lambda module, given, states: seen.update(states=states))
        model(ids, policy=recorder)
        assert torch.equal(recorder.states[0], seen["states"])
        assert recorder.memories == [None, 0, 1]

    def test_labels_give_the_mean_nll_of_the_next_token(self):
        model, ids, routes = tiny_model(), random_ids(), random_routes()
        output = model(ids, routes=routes, labels=ids)
        nll = -output.logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
        torch.testing.assert_close(output.loss, nll.mean())

    @pytest.mark.parametrize("kept", [1, 4, torch.tensor([2, 7])], ids=["last", "last four", "given"])
    def test_logits_to_keep(self, kept):
        model, ids, routes = tiny_model(), random_ids(), random_routes()
        output, whole = model(ids, routes=routes, logits_to_keep=kept), model(ids, routes=routes)
        expected = whole.logits[:, -kept:] if isinstance(kept, int) else whole.logits[:, kept]
        torch.testing.assert_close(output.logits, expected)
        assert torch.equal(output.routes, routes)

    def test_embeddings_may_be_given_in_place_of_ids(self):
        model, ids, routes = tiny_model(), random_ids(), random_routes()
        embedded = model.model.embed_tokens(ids)
        assert torch.equal(model(inputs_embeds=embedded, routes=routes).logits, model(ids, routes=routes).logits)

    def test_hidden_states_are_recorded_on_request(self):
        output = tiny_model()(random_ids(), output_hidden_states=True)
        assert [tuple(states.shape) for states in output.hidden_states] == [(2, 9, 16)] * 4

    @pytest.mark.parametrize(
        ("routes", "expected"),
        [
            (torch.ones(4, dtype=torch.long), r"shape \[3\] or \[2, 9, 3\], got shape \[4\]"),
            (torch.ones(2, 8, 3, dtype=torch.long), r"shape \[3\] or \[2, 9, 3\], got shape \[2, 8, 3\]"),
            (torch.ones(3), r"must be integers .* got dtype torch\.float32"),
            (torch.ones(3, dtype=torch.bool), r"must be integers .* got dtype torch\.bool"),
            ([1, 2, 3], r"only SKIP=0, SMALL=1, BIG=2, got values 1 \.\. 3"),
            ([-1, 2, 2], r"only SKIP=0, SMALL=1, BIG=2, got values -1 \.\. 2"),
        ],
    )
    def test_illegal_routes_are_refused(self, routes, expected):
        with pytest.raises(ValueError, match=expected):
            tiny_model()(random_ids(), routes=routes)

    @pytest.mark.parametrize(
        ("inputs", "expected"),
        [
            ({"routes": [1, 1, 1], "policy": Recorder(random_routes())}, "routes or a policy, not both"),
            ({"execution": "dense"}, "'sparse' or 'reference', got 'dense'"),
            ({"inputs_embeds": torch.ones(2, 9, 16)}, "exactly one of input_ids and inputs_embeds, got 2"),
        ],
    )
    def test_contradictions_are_refused(self, inputs, expected):
        with pytest.raises(ValueError, match=expected):
            tiny_model()(random_ids(), **inputs)

    def test_no_input_is_refused(self):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds, got 0"):
            tiny_model()(routes=[1, 1, 1])
